"""Methods that look into attention, all at once: each still acts, the source keeps every bit, the network is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Noise, Pipeline, build, guided, levels, sample
from ldm_pipe.editing.pairs import Pairs
from ldm_pipe.editing.plug_and_play import PlugAndPlay
from ldm_pipe.editing.prompt_to_prompt import Replacing
from ldm_pipe.editing.shape_guided import ShapeGuided
from ldm_pipe.editing.structured import Structured

PROMPTS = ("a fox on a blue background", "a cat on a blue background")
METHODS = (PlugAndPlay(), Replacing(blend=True), Structured(), Replacing(weights="cat=2", cross=0.0, own=0.0), ShapeGuided())


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


def draw(pipe: Pipeline, methods: tuple[Any, ...]) -> tuple[Tensor, Any]:
    model, text = pipe.bundle.model, pipe.bundle.text
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:56, 8:56] = 1
    walk = tuple(levels.trailing(model.path, 4))
    pairs = Pairs(*PROMPTS, ((0, 1),), model, text, walk, build("sampler", "ddim"), mask=mask)
    for method in methods:
        pairs = method(pairs)
    branches = model.branches(**{"cond": text(PROMPTS), "uncond": text(["", ""]), **pairs.conds})
    denoise = guided(branches, CFG(3.0))
    for guide in pairs.guides:
        denoise = guide(denoise)
    noise = Noise((7, 7), (pipe.bundle.codec.channels, 16, 16))
    return sample(denoise, noise.start(), walk, pairs.sampler, noise), branches.evaluations


def test_all_at_once(pipe: Pipeline) -> None:
    """In any number; every one of them changes the target, and none costs an evaluation."""
    weights = [p.clone() for p in pipe.bundle.model.parameters()]
    plain, counts = draw(pipe, ())
    before = plain
    for number in range(1, 4):
        x, evaluations = draw(pipe, METHODS[:number])
        assert torch.equal(x[0], plain[0])
        assert not torch.allclose(x[1], before[1], atol=1e-4), number
        assert evaluations == counts
        before = x
    for method in METHODS[3:]:
        x, evaluations = draw(pipe, (method,))
        assert torch.equal(x[0], plain[0])
        assert not torch.allclose(x[1], plain[1], atol=1e-2)
        assert evaluations == counts
    assert all(torch.equal(a, b) for a, b in zip(weights, pipe.bundle.model.parameters(), strict=True))
    assert not any(m._forward_hooks for m in pipe.bundle.model.modules())
    assert torch.equal(draw(pipe, ())[0], plain)
