"""Local blend: exact at its ends, fresh for every run, source untouched, pairs apart, on U-Net and transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Cond, Model, Noise, Pipeline, UsageError, build, guided, levels, sample, trajectory
from ldm_pipe.attention import grid
from ldm_pipe.editing.local_blend import LocalBlend, chosen
from ldm_pipe.editing.pairs import until
from ldm_pipe.editing.prompt_to_prompt import Replacing
from ldm_pipe.walk import Step

Make = Callable[[str], Any]
WORDS = ((2,), (2, 3))
kinds = pytest.mark.parametrize("kind", ["unet", "pixart"])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conds(pairs: int = 1) -> dict[str, Cond]:
    """Different tokens for sources and targets, the other branch without words."""
    tokens = torch.cat([drawn(1, 6, 16, seed=k + 1) for k in (0, 1) for _ in range(pairs)])
    mask = torch.ones(2 * pairs, 6, dtype=torch.bool)
    mask[:, 5] = False
    return {"cond": Cond(tokens=4 * tokens, mask=mask), "uncond": Cond(tokens=0 * tokens, mask=mask)}


def steps(model: Model, sampler: Any, pairs: int = 1, count: int = 5) -> list[Step]:
    noise = Noise((7,) * 2 * pairs, (4, 8, 8))
    denoise = guided(model.branches(**conds(pairs)), CFG(2.0))
    walk = levels.trailing(model.path, count)
    return list(trajectory(denoise, sampler.start(noise.start(), walk[0]), walk, sampler, noise))


def blend(model: Model, name: str = "ddim", **fields: Any) -> LocalBlend:
    return LocalBlend(build("sampler", name), model, fields.pop("words", WORDS), **fields)


@kinds
@pytest.mark.parametrize("name", ["ddim", "dpm2m", "heun"])
def test_the_ends_are_exact(diffusers_model: Make, kind: str, name: str) -> None:
    """threshold 1 lets nothing differ, a negative one everything; begin 0 never blends. The source never changes a bit."""
    model = diffusers_model(kind)
    plain = steps(model, build("sampler", name))[-1].x
    held = steps(model, blend(model, name, threshold=1.0))[-1].x
    free = [blend(model, name, threshold=-1.0), blend(model, name, begin=0.0), blend(model, name, pairs=())]
    some = steps(model, blend(model, name, threshold=0.9))
    assert all(torch.equal(steps(model, sampler)[-1].x, plain) for sampler in free)
    assert torch.equal(held[1], held[0])
    assert all(torch.equal(x[0], plain[0]) for x in (held, some[-1].x))
    assert not torch.allclose(plain[1], plain[0], atol=1e-2)
    assert sum(int((s.x[1] != s.x[0]).sum()) for s in some) > 0
    assert any(torch.equal(s.x[1, :, 0, 0], s.x[0, :, 0, 0]) or bool((s.x[1] == s.x[0]).any()) for s in some)


def test_the_mask_is_the_words_attention_widened_and_united() -> None:
    """By hand: one hot place of the source's map and one of the target's, of a 4x4 map over a latent of 8x8."""
    sampler = LocalBlend(build("sampler", "ddim"), torch.nn.Linear(1, 1), WORDS)
    one, two = torch.full((1, 16), 0.01), torch.full((1, 16), 0.02)
    one[0, 0], two[0, 15] = 1.0, 5.0
    coarse = torch.ones(1, 4)
    mask = sampler.mask({(0, True, 16): one, (1, True, 16): two, (0, True, 4): coarse, (0, False, 64): torch.ones(1, 64)}, 8, 8)
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[:4, :4] = wanted[4:, 4:] = True
    assert torch.equal(mask[0, 0], wanted)
    one[0, 3] = 0.31  # of the maximum 1, just above the threshold; 0.29 lies below
    assert sampler.mask({(0, False, 16): one}, 8, 8)[0, 0].sum() == 16 + 16
    one[0, 3] = 0.29
    assert sampler.mask({(0, False, 16): one}, 8, 8)[0, 0].sum() == 16
    with pytest.raises(UsageError, match="no cross-attention to the words"):
        sampler.mask({}, 8, 8)


@pytest.mark.parametrize(("share", "free"), [(0.0, 0), (0.2, 1), (0.6, 3), (1.0, 5)])
def test_it_begins_after_its_share_of_the_steps(diffusers_model: Make, share: float, free: int) -> None:
    model = diffusers_model("unet")
    walk = levels.trailing(model.path, 5)
    done = steps(model, blend(model, threshold=1.0, begin=until(walk, share)))
    assert [torch.equal(s.x[1], s.x[0]) for s in done] == [False] * free + [True] * (5 - free)


@kinds
def test_maps_are_averaged_over_the_run_and_start_fresh(diffusers_model: Make, kind: str) -> None:
    """A map is a share of attention: the sums grow by at most layers a step, and a second run repeats the first."""
    model = diffusers_model(kind)
    sampler = blend(model, threshold=0.9)
    first, second = steps(model, sampler), steps(model, sampler)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))
    sums = [float(s.memory[1][0, kind == "unet", 64 if kind == "unet" else 16].sum()) for s in first]
    assert sums == sorted(sums)
    one, whole = sums[0], sums[-1]
    assert math.isclose(whole, 5 * one, rel_tol=0.3), "one evaluation a step adds about as much each time"
    every = steps(model, blend(model, words=(tuple(range(6)), ())))[-1].memory[1]
    layers = {(True, 64): 2, (False, 64): 1, (False, 16): 1} if kind == "unet" else {(False, 16): 3}
    assert set(every) == {(0, *where) for where in layers}
    for (side, *where), total in every.items():
        assert side == 0
        torch.testing.assert_close(total, torch.full_like(total, 5.0 * layers[tuple(where)]))  # type: ignore[index]
    both = steps(model, blend(model, words=((2,), (2,))))[-1].memory[1]
    assert all(not torch.allclose(both[0, *where], both[1, *where]) for where in layers), "each side looks at its own picture"


@kinds
def test_two_pairs_equal_each_alone(diffusers_model: Make, kind: str) -> None:
    model = diffusers_model(kind)
    both = steps(model, blend(model, pairs=((0, 2), (1, 3)), threshold=0.9), pairs=2)[-1].x
    alone = steps(model, blend(model, threshold=0.9))[-1].x
    for row in (2, 3):
        torch.testing.assert_close(both[row], alone[1], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="needs its pictures in one batch"):
        steps(model, blend(model, pairs=((0, 2),)))


def test_words_are_those_that_differ_or_those_listed(pipe: Pipeline) -> None:
    text: Any = pipe.bundle.text
    prompts = ("a fox on a blue background", "a red cat on a blue background")

    def find(words: str = "") -> tuple[tuple[int, ...], ...]:
        return chosen(text.tokenizer, text.window, prompts, words)

    assert find() == ((2,), (2, 3))
    assert find("fox, cat") == ((2,), (3,))
    assert find("blue") == ((5,), (6,))
    with pytest.raises(UsageError, match="'owl' is a word of none of"):
        find("owl")
    with pytest.raises(UsageError, match="the same words"):
        chosen(text.tokenizer, text.window, (prompts[0],) * 2)


def test_a_grid_is_found_or_refused() -> None:
    assert grid(64, 16, 16) == (8, 8)
    assert grid(15, 9, 19) == (3, 5) or grid(15, 9, 19)[0] * grid(15, 9, 19)[1] == 15
    assert grid(8, 8, 16) == (2, 4)
    with pytest.raises(UsageError, match="positions of attention are no map of 8x8"):
        grid(7, 8, 8)


def test_the_built_in_models_background_stays(pipe: Pipeline) -> None:
    """Fox to cat from one noise: what lies outside the words' attention is the source's to the bit."""
    text, model = pipe.bundle.text, pipe.bundle.model
    prompts = ["a fox on a blue background", "a cat on a blue background"]
    tokens: Any = text
    words = chosen(tokens.tokenizer, tokens.window, prompts)
    noise, walk = Noise((7, 7), (pipe.bundle.codec.channels, 16, 16)), levels.trailing(model.path, 8)
    denoise = guided(model.branches(cond=text(prompts), uncond=text(["", ""])), CFG(3))
    sampler = LocalBlend(build("sampler", "ddim"), model, (words[0], words[1]), begin=until(walk, 0.2))
    x = sample(denoise, noise.start(), walk, sampler, noise)
    same = (x[1] == x[0]).all(0)
    assert 0.05 < float(same.float().mean()) < 0.95
    assert float(same[[0, 0, -1, -1], [0, -1, 0, -1]].float().mean()) >= 0.5, "corners are background"


def test_fields_of_an_edit(pipe: Pipeline) -> None:
    for fields, words in (({"weights": "small"}, "takes words and numbers"), ({"cross": 2.0}, "take 0 to 1")):
        with pytest.raises(UsageError, match=words):
            build("editing", "prompt_to_prompt", **fields)
    method = build("editing", "prompt_to_prompt", blend="true", weights="cat=2, blue=-1")
    assert method == Replacing(blend=True, weights="cat=2, blue=-1")
    assert build("editing", "prompt_to_prompt", blend="fox, cat").blend == "fox, cat"
