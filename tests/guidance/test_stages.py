"""Stages: the same denoiser twice is one denoiser to the bit, borders are half-open, memory ends at a border."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Noise, UsageError, build, levels, sample, trajectory
from ldm_pipe.guidance.stages import Refine, Relay
from ldm_pipe.model import Estimate

INDEX = torch.arange(8, dtype=torch.float64)
PRIOR = Gaussian(INDEX.sin(), 0.9 ** (INDEX[:, None] - INDEX).abs())
OTHER = Gaussian(INDEX.cos(), torch.eye(8, dtype=torch.float64))
NOISE = Noise((1, 2), (2, 2, 2), dtype=torch.float64)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2m", "ddpm"])
def test_the_same_denoiser_twice_is_one(name: str) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    ends = [sample(d, NOISE.start(), walk, build("sampler", name), NOISE) for d in (PRIOR, Refine(PRIOR, 0.4)(PRIOR))]
    assert torch.equal(*ends)


def test_borders_are_half_open_and_stages_nest() -> None:
    asked: list[str] = []

    def named(name: str) -> object:
        def denoise(x: Tensor, level: Level) -> Estimate:
            asked.append(name)
            return PRIOR(x, level)

        return denoise

    stages = Refine(named("fine"), 0.25)(Refine(named("middle"), 0.5)(named("base")))  # type: ignore[arg-type]
    for u in (1.0, 0.75, 0.5, 0.49, 0.25, 0.24, 0.0):
        stages(NOISE.start(), Level(1 - u, u))
    assert asked == ["base", "base", "base", "middle", "middle", "fine", "fine"]


def test_a_walk_of_two_stages_is_two_walks() -> None:
    """Under Euler, as two pipelines do it, and under 2M with its memory dropped at the border."""
    walk = levels.linspace(Flow(), 10)
    cut = next(k for k, lv in enumerate(walk) if lv.u < 0.5)
    for name in ("euler", "dpm2m"):
        inner = build("sampler", name)
        x = sample(PRIOR, NOISE.start(), walk[: cut + 1], inner, NOISE)
        x = sample(OTHER, x, walk[cut:], inner, NOISE)
        whole = sample(Refine(OTHER, 0.5)(PRIOR), NOISE.start(), walk, Relay(inner, (0.5,)), NOISE)
        assert torch.equal(whole, x)
    kept = sample(Refine(OTHER, 0.5)(PRIOR), NOISE.start(), walk, build("sampler", "dpm2m"), NOISE)
    assert not torch.equal(kept, whole)


def test_memory_ends_at_borders_only() -> None:
    walk = [Level(1 - u, u) for u in (0.9, 0.7, 0.5, 0.3, 0.1)]
    for border, dropped in ((0.5, [False, False, True, False]), (0.51, [False, True, False, False]), (0.05, [False] * 4)):
        steps = trajectory(PRIOR, NOISE.start(), walk, Relay(build("sampler", "dpm2m"), (border,)), NOISE)
        assert [s.memory is None for s in steps] == dropped


@pytest.mark.parametrize("below", [-0.1, 1.1, float("nan")])
def test_a_border_is_a_u(below: float) -> None:
    with pytest.raises(UsageError, match="below is"):
        Refine(PRIOR, below)
