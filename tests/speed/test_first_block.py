"""First block caching: what diffusers' hook does, but for each image; the rule by hand; how many blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import CFG, Cond, UsageError, guided, levels
from ldm_pipe.level import Level
from ldm_pipe.model import Model
from ldm_pipe.patch import Patched, Run
from ldm_pipe.speed.first_block import FirstBlock


@pytest.fixture(scope="module")
def model(diffusers_model: Callable[[str], Any]) -> Model:
    return diffusers_model("pixart")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, seed: int = 1) -> Cond:
    return Cond(tokens=draw(rows, 6, 16, seed=seed), mask=torch.ones(rows, 6, dtype=torch.bool))


@contextmanager
def counted(model: Model) -> Iterator[list[int]]:
    """How many rows go through the second block, in each call that reaches its inside."""
    seen: list[int] = []
    block = model.network.inner.transformer_blocks[1].ff  # type: ignore[union-attr]
    hook = block.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    yield seen
    hook.remove()


def walk(model: Model, count: int = 8) -> list[Level]:
    return levels.trailing(model.path, count)


def patched(model: Model, threshold: float, denoise: Any) -> Any:
    return Patched(model, (FirstBlock(threshold),), Run(tuple(walk(model))))(denoise)


def path(rows: int) -> list[Tensor]:
    """x at every step: the first image is at rest after the second step, the others move on and on."""
    start, move = draw(rows, 4, 8, 8), draw(rows, 4, 8, 8, seed=5)
    pace = torch.ones(rows, 1, 1, 1)
    pace[0] = 0.02
    return [start + k * pace * move for k in range(8)]


@torch.no_grad()
def outputs(denoise: Any, model: Model, xs: list[Tensor]) -> list[Tensor]:
    return [denoise(x, level).noise for x, level in zip(xs, walk(model)[:-1], strict=True)]


def test_one_image_alone_is_what_diffusers_makes(model: Model) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    xs, cond = path(1), tokens(1)
    with counted(model) as ours:
        mine = outputs(patched(model, 0.08, model.bind(cond)), model, xs)
    plain = outputs(model.bind(cond), model, xs)
    inner: Any = model.network.inner  # type: ignore[union-attr]
    apply_first_block_cache(inner, FirstBlockCacheConfig(threshold=0.08))
    _set_cache_context(inner, CacheContext("cond"))
    try:
        theirs = outputs(model.bind(cond), model, xs)
    finally:
        for block in inner.transformer_blocks:
            for hook in ("fbc_leader_block_hook", "fbc_block_hook"):
                HookRegistry.check_if_exists_or_initialize(block).remove_hook(hook, recurse=False)
    assert 1 <= len(ours) < 8
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not torch.equal(mine[-1], plain[-1])


def test_each_image_is_decided_for_itself(model: Model) -> None:
    """Three at once are three alone, under guidance too, and the rows that run are those that run alone."""
    xs = path(3)

    def denoise(rows: slice) -> Any:
        cond, uncond = tokens(3).take(rows), tokens(3, seed=9).take(rows)
        return patched(model, 0.12, guided(model.branches(cond=cond, uncond=uncond), CFG(3)))

    with counted(model) as together:
        whole = outputs(denoise(slice(0, 3)), model, xs)
    alone_counts = 0
    for k in range(3):
        rows = slice(k, k + 1)
        with counted(model) as alone:
            one = outputs(denoise(rows), model, [x[rows] for x in xs])
        alone_counts += sum(alone)
        for a, b in zip(one, whole, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=1e-4, atol=1e-4)
    assert sum(together) == alone_counts
    assert 0 < sum(together) < 8 * 6
    assert any(0 < n < 6 for n in together), "no call in which some go on and others wait"


def test_the_rule_by_hand(model: Model) -> None:
    """All blocks run where |added - added then| is more than the threshold of |added then|, then being when all last ran."""
    xs, cond, inner = path(1), tokens(1), model.network.inner  # type: ignore[union-attr]
    added: list[Tensor] = []
    block = inner.transformer_blocks[0]
    hook = block.register_forward_hook(lambda m, args, out: added.append(out - args[0]))
    outputs(model.bind(cond), model, xs)
    hook.remove()
    then, expected = added[0], [True]
    for now in added[1:]:
        expected.append(bool((now - then).abs().mean() > 0.08 * then.abs().mean()))
        then = now if expected[-1] else then
    ran, denoise = [], patched(model, 0.08, model.bind(cond))
    with counted(model) as seen, torch.no_grad():
        for x, level in zip(xs, walk(model)[:-1], strict=True):
            before = len(seen)
            denoise(x, level)
            ran.append(len(seen) > before)
    assert ran == expected
    assert 1 < sum(expected) < 8


def test_networks_whose_blocks_hand_on_more_are_refused() -> None:
    class Joint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
            for block in self.transformer_blocks:
                block.norm1_context = nn.Identity()

    with pytest.raises(UsageError, match="Joint is none"):
        FirstBlock().changes(Joint(), Run((Level(0.1, 0.9), Level(1.0, 0.0))))
    with pytest.raises(UsageError, match="0 to 10"):
        FirstBlock(-1)
