"""Token merging: what is alike becomes one, everybody gets an answer, equal positions lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe import Model
from ldm_pipe.level import Level
from ldm_pipe.patch import Run, changed, root
from ldm_pipe.speed.tome import Merge, ToMe, _takers


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_one_place_of_every_square_takes() -> None:
    for height, width in ((4, 6), (5, 7)):
        places = _takers(height, width, 3)
        squares = {(int(p) // width // 2, int(p) % width // 2) for p in places}
        assert squares == {(i, j) for i in range(height // 2) for j in range(width // 2)}
        assert len(places) == len(squares)
    assert torch.equal(_takers(8, 8, 3), _takers(8, 8, 3))
    assert not torch.equal(_takers(8, 8, 3), _takers(8, 8, 4))
    assert {int(p) for s in range(20) for p in _takers(2, 2, s)} == {0, 1, 2, 3}


def test_every_position_is_counted_once_and_answered() -> None:
    x = features(3, 64, 6)
    for ratio in (0.0, 0.25, 0.5, 0.75):
        merge = Merge.of(x, 8, 8, ratio, 1)
        assert merge(x).shape == (3, 64 - int(ratio * 64), 6)
        for row in range(3):
            assert sorted([*merge.takers.tolist(), *merge.keep[row].tolist(), *merge.gone[row].tolist()]) == list(range(64))
        back = merge.undo(merge(x))
        assert torch.equal(
            back.gather(1, merge.keep[..., None].expand(-1, -1, 6)), x.gather(1, merge.keep[..., None].expand(-1, -1, 6))
        )


def test_the_merged_is_the_mean_and_goes_to_the_most_alike() -> None:
    """By hand: four positions of one square; the two nearest in direction become one."""
    taker = int(_takers(2, 2, 0)[0])
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    x[0, taker] = torch.tensor([2.0, 0.0])
    others = [p for p in range(4) if p != taker]
    x[0, others[0]], x[0, others[1]], x[0, others[2]] = (torch.tensor(v) for v in ([0.0, 1.0], [4.0, 0.1], [-1.0, 0.0]))
    merge = Merge.of(x, 2, 2, 0.25, 0)
    assert merge.gone.tolist() == [[others[1]]]
    torch.testing.assert_close(merge(x)[0, -1], torch.tensor([3.0, 0.05], dtype=torch.float64))
    back = merge.undo(merge(x))
    assert torch.equal(back[0, others[1]], back[0, taker])
    assert torch.equal(back[0, others[0]], x[0, others[0]])


def test_most_alike_go_first() -> None:
    x = features(2, 16, 5)
    merge = Merge.of(x, 4, 4, 0.25, 1)
    unit = F.normalize(x, dim=-1)
    likeness = (unit @ unit[:, merge.takers].mT).amax(-1)
    for row in range(2):
        assert likeness[row, merge.gone[row]].min() >= likeness[row, merge.keep[row]].max()


@torch.no_grad()
def test_equal_positions_lose_nothing(model: Model) -> None:
    """Where every 2x2 square holds one vector, merging three quarters is attention over the squares: the same answers."""
    attention = root(model).get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    squares = features(2, 8, 4, 4)
    x = F.interpolate(squares, scale_factor=2, mode="nearest").flatten(2).transpose(1, 2)
    run = Run((Level(0.1, 0.9), Level(1.0, 0.0)))
    changes = ToMe(0.75).changes(root(model), run)
    merged = Sized()
    name = "attn1"
    merged.attn1 = attention
    with changed(merged, {"": [changes[""]], name: [next(c for n, c in changes.items() if n.endswith(name))]}):
        out = merged(torch.zeros(2, 4, 8, 8), x)
    torch.testing.assert_close(out, attention(x))


class Sized(nn.Module):
    """A network that is one attention."""

    attn1: nn.Module

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.attn1(tokens)


def test_attention_sees_fewer_positions_at_the_full_size_alone(draw: Callable[..., Tensor], model: Model) -> None:
    for deepest, expected in ((1, {64: 32, 16: 16, 4: 4}), (2, {64: 32, 16: 8, 4: 4})):
        seen: dict[int, set[int]] = {64: set(), 16: set(), 4: set()}
        watch = Watch(seen)
        draw(watch, ToMe(0.5, deepest), steps=2)
        assert {size: (min(found),) for size, found in seen.items() if found} == {
            size: (expected[size],) for size, found in seen.items() if found
        }
        assert seen[64]


class Watch(ToMe):
    """How many positions each self-attention of a size is given."""

    def __init__(self, seen: dict[int, set[int]]) -> None:
        object.__setattr__(self, "seen", seen)

    def changes(self, network: nn.Module, run: Run) -> Any:
        sizes = {"down_blocks.0": 64, "down_blocks.1": 16, "mid_block": 16, "up_blocks.0": 16, "up_blocks.1": 64}

        def watching(name: str) -> Any:
            size = next(s for n, s in sizes.items() if name.startswith(n))

            def change(call: Callable[..., Any], x: Tensor) -> Any:
                self.seen[size].add(x.shape[1])  # type: ignore[attr-defined]
                return call(x)

            return change

        return {n: watching(n) for n, _ in network.named_modules() if n.endswith("attn1")}
