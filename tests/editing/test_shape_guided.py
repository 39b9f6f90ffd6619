"""Inside-outside attention: blocks of maps exactly zero, masses, symmetry, and the source to the bit around the shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Level, Model, Noise, Pipeline, UsageError, build, guided, levels, trajectory
from ldm_pipe.attention import Site
from ldm_pipe.cond import Rows
from ldm_pipe.editing.pairs import Pairs, until
from ldm_pipe.editing.shape_guided import Backdrop, InsideOutside, ShapeGuided, halved, shape
from ldm_pipe.patch import Attending
from ldm_pipe.walk import Step

Make = Callable[[str], Any]
kinds = pytest.mark.parametrize("kind", ["unet", "pixart"])
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 2:6, :4] = 1
LEVEL = Level(0.6, 0.8)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(cross: bool, level: Level = LEVEL, bias: Tensor | None = None) -> Site:
    return Site("a", cross, Rows(("cond", "uncond"), 2, level), lambda t: t, bias)


def weights(rule: InsideOutside, cross: bool, bias: Tensor | None = None, tokens: int = 7) -> tuple[Tensor, Tensor]:
    """The maps that a rule leaves, of 4 rows, 2 heads and 64 places, and the usual ones: the values are unit vectors."""
    count = tokens if cross else 64
    q, k = drawn(4, 2, 64, 8), drawn(4, 2, count, 8, seed=1)
    v = torch.eye(count).expand(4, 2, count, count)
    usual = site(cross, bias=bias).maps(q, k, slice(None))
    return rule(site(cross, bias=bias), q, k, v, usual), usual


def test_self_attention_is_split_exactly() -> None:
    """Of the rows named, in both branches: nothing passes the border, the rest is as it was, no mass is added."""
    out, usual = weights(InsideOutside(MASK, (1,)), cross=False)
    inside = MASK.flatten() > 0
    crossing = inside[:, None] != inside[None]
    for row in (1, 3):
        assert bool((out[row][:, crossing] == 0).all())
        torch.testing.assert_close(out[row][:, ~crossing], usual[row][:, ~crossing])
    assert torch.equal(out[[0, 2]], usual[[0, 2]])
    assert bool((out[1].sum(-1) < 1).all())


def test_cross_attention_is_split_exactly() -> None:
    """7 tokens: the start, 3 of the inside, 3 of the outside; new ones count 2.5 times in the conditional branch alone."""
    out, usual = weights(InsideOutside(MASK, (1,), new=(2, 5)), cross=True)
    inside = MASK.flatten() > 0
    for row in (1, 3):
        assert bool((out[row][..., 0] == 0).all())
        assert bool((out[row][:, inside][..., 4:] == 0).all())
        assert bool((out[row][:, ~inside][..., 1:4] == 0).all())
        torch.testing.assert_close(out[row][:, ~inside][..., 4:], usual[row][:, ~inside][..., 4:])
        scale = torch.tensor([1.0, 2.5 if row == 1 else 1.0, 1.0])
        torch.testing.assert_close(out[row][:, inside][..., 1:4], usual[row][:, inside][..., 1:4] * scale)
    assert torch.equal(out[[0, 2]], usual[[0, 2]])
    even, _ = weights(InsideOutside(MASK, (1,)), cross=True, tokens=8)
    assert bool((even[1][..., 7] == 0).all()), "a place that is left over belongs to none"
    assert bool((even[1][:, inside][..., 4:] == 0).all())
    same, usual = weights(InsideOutside(MASK, (1,), new=(2,), scale=1.0), cross=True)
    assert bool((same[1].sum(-1) < 1).all())
    assert bool((same[1] <= usual[1] + 1e-6).all())


def test_masked_tokens_stay_masked() -> None:
    bias = torch.zeros(4, 2, 1, 7)
    bias[..., 3] = -1e4
    out, usual = weights(InsideOutside(MASK, (1,)), True, bias)
    assert bool((out[1][..., 3] == 0).all())
    torch.testing.assert_close(out[1][:, MASK.flatten() > 0][..., 1:3], usual[1][:, MASK.flatten() > 0][..., 1:3])


def test_the_complement_of_a_mask_with_the_halves_exchanged_is_the_same() -> None:
    q, k, v = drawn(4, 2, 64, 8), drawn(4, 2, 7, 8, seed=1), drawn(4, 2, 7, 8, seed=2)
    swapped = [0, 4, 5, 6, 1, 2, 3]
    one = InsideOutside(MASK, (1,))(site(True), q, k, v, torch.zeros_like(q))
    two = InsideOutside(1 - MASK, (1,))(site(True), q, k[:, :, swapped], v[:, :, swapped], torch.zeros_like(q))
    torch.testing.assert_close(one, two)
    own = [InsideOutside(m, (1,))(site(False), q, q, q, torch.zeros_like(q)) for m in (MASK, 1 - MASK)]
    torch.testing.assert_close(own[0], own[1])


def test_a_shape_that_is_everything_leaves_self_attention() -> None:
    out, usual = weights(InsideOutside(torch.ones(1, 1, 8, 8), (0, 1)), cross=False)
    torch.testing.assert_close(out, usual)


def test_masks_are_resized_by_their_nearest_pixels() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :7, :8] = 1
    assert shape(mask, (2, 2)).flatten().tolist() == [True, False, False, False]
    assert int(shape(mask, (8, 8)).sum()) == 4 * 4
    assert torch.equal(shape(MASK, (8, 8)), MASK > 0)


def test_tokens_are_the_halves_of_two_prompts() -> None:
    inside, outside = torch.arange(77.0)[None, :, None], 100 + torch.arange(77.0)[None, :, None]
    both = halved(inside, outside).flatten().tolist()
    assert both == [*range(39), *range(101, 139)]
    assert halved(inside[:, :8], outside[:, :8]).flatten().tolist() == [0, 1, 2, 3, 101, 102, 103, 7]


def steps(model: Model, sampler: Any, rule: InsideOutside | None = None, pairs: int = 1, count: int = 4) -> list[Step]:
    tokens = torch.cat([4 * drawn(1, 7, 16, seed=k + 1) for k in (0, 1) for _ in range(pairs)])
    noise = Noise((7,) * 2 * pairs, (4, 8, 8))
    cond = Cond(tokens=tokens, mask=torch.ones(2 * pairs, 7, dtype=torch.bool))
    denoise = guided(model.branches(cond=cond, uncond=replace(cond, tokens=0 * tokens)), CFG(2.0))
    denoise = Attending(model, rule)(denoise) if rule else denoise
    return list(trajectory(denoise, noise.start(), levels.trailing(model.path, count), sampler, noise))


@kinds
@pytest.mark.parametrize("name", ["ddim", "dpm2m", "heun"])
def test_around_the_shape_is_the_source_at_every_level(diffusers_model: Make, kind: str, name: str) -> None:
    """To the bit, at the level the step has reached; the source itself is untouched, and inside it is not the source."""
    model, outside = diffusers_model(kind), (MASK == 0)[0].expand(4, 8, 8)
    plain = steps(model, build("sampler", name))
    done = steps(model, Backdrop(build("sampler", name), MASK), InsideOutside(MASK, (1,), new=(2,)))
    for one, two in zip(done, plain, strict=True):
        assert torch.equal(one.x[0], two.x[0])
        assert torch.equal(one.x[1][outside], one.x[0][outside])
        assert not torch.allclose(one.x[1][~outside], one.x[0][~outside], atol=1e-3)


@kinds
def test_neutral_settings_change_no_bit(diffusers_model: Make, kind: str) -> None:
    model, sampler = diffusers_model(kind), build("sampler", "ddim")
    plain = steps(model, sampler)[-1].x
    assert torch.equal(steps(model, Backdrop(sampler, torch.ones(1, 1, 8, 8)))[-1].x, plain)
    assert torch.equal(steps(model, Backdrop(sampler, MASK, pairs=()))[-1].x, plain)
    assert torch.equal(steps(model, sampler, InsideOutside(MASK, ()))[-1].x, plain)
    assert torch.equal(steps(model, sampler, InsideOutside(MASK, (1,), branches=("weak",)))[-1].x, plain)
    ruled = steps(model, sampler, InsideOutside(MASK, (1,)))[-1].x
    assert torch.equal(ruled[0], plain[0])
    assert not torch.allclose(ruled[1], plain[1], atol=1e-3)


@pytest.mark.parametrize(("share", "split"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_self_attention_is_split_for_its_share_of_the_steps(diffusers_model: Make, share: float, split: int) -> None:
    model = diffusers_model("unet")
    walk = levels.trailing(model.path, 4)
    q, v = drawn(4, 2, 64, 8), drawn(4, 2, 64, 8, seed=2)
    usual = site(False).maps(q, q, slice(None)) @ v
    rule = InsideOutside(MASK, (1,), own=until(walk, share))
    changed = [not torch.equal(rule(site(False, level), q, q, v, usual), usual) for level in walk[:-1]]
    assert changed == [True] * split + [False] * (4 - split)


@kinds
def test_two_pairs_equal_each_alone(diffusers_model: Make, kind: str) -> None:
    model, sampler = diffusers_model(kind), build("sampler", "ddim")
    alone = steps(model, Backdrop(sampler, MASK), InsideOutside(MASK, (1,)))[-1].x
    both = steps(model, Backdrop(sampler, MASK, ((0, 2), (1, 3))), InsideOutside(MASK, (2, 3)), pairs=2)[-1].x
    for row in (2, 3):
        torch.testing.assert_close(both[row], alone[1], rtol=1e-4, atol=1e-4)


def test_as_an_edit_it_splits_the_targets_tokens_and_needs_a_mask() -> None:
    pipe = Pipeline.from_pretrained("builtin", "cpu", "fp32")
    text, model = pipe.bundle.text, pipe.bundle.model
    walk, sampler = levels.trailing(model.path, 4), build("sampler", "ddim")
    pairs = Pairs("a fox on a blue background", "a cat on a blue background", ((0, 1),), model, text, walk, sampler)
    with pytest.raises(UsageError, match="needs the object's shape"):
        ShapeGuided()(pairs)
    with pytest.raises(UsageError, match="own takes 0 to 1"):
        ShapeGuided(own=2.0)
    done = ShapeGuided(outside="a blue background")(replace(pairs, mask=torch.ones(1, 1, 64, 64)))
    cond, uncond = done.conds["cond"], done.conds["uncond"]
    assert isinstance(cond, Cond)
    assert isinstance(uncond, Cond)
    assert cond.tokens is not None
    assert uncond.tokens is not None
    source, target, outside, empty = (text([p]).tokens[0] for p in (pairs.source, pairs.target, "a blue background", ""))  # type: ignore[index]
    assert torch.equal(cond.tokens[0], source)
    assert torch.equal(cond.tokens[1], halved(target[None], outside[None])[0])
    assert torch.equal(uncond.tokens[0], empty)
    assert torch.equal(uncond.tokens[1], halved(empty[None], empty[None])[0])
    rule: Any = done.guides[-1]
    assert rule.rule.new == (2,)
    again = ShapeGuided()(replace(pairs, mask=torch.ones(1, 1, 64, 64), conds={"uncond": lambda level: text(["x", "y"])}))
    moving: Any = again.conds["uncond"]
    assert torch.equal(moving(LEVEL).tokens[0], text(["x"]).tokens[0])  # type: ignore[index]
