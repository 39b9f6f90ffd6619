"""DPM-Solver++(2M): diffusers' multistep solver on VP and flow, second order, first order where it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ldm_pipe import CLEAN, EPS, VP, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.euler import Euler

Close = Callable[[Tensor, Tensor, float], None]
CONFIG: dict[str, Any] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 6), ("trailing", 20), ("leading", 25), ("linspace", 16)])
def test_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, spacing: str, steps: int
) -> None:
    made = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", **CONFIG)
    path = table(made)
    walk = getattr(levels, spacing)(path, steps)
    made.set_timesteps(timesteps=[int(path.time(lv)) for lv in walk[:-1]])
    x = start = DPM2M().start(noise.start(), walk[0])
    for t, here in zip(made.timesteps, walk, strict=False):
        x = made.step(EPS.target(*prior(x, here)[:2], here), t, x).prev_sample
    close(sample(prior, start, walk, DPM2M(), noise), x, 1e-5)


def test_equals_diffusers_on_the_flow_path(prior: Gaussian, noise: Noise, close: Close) -> None:
    made = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", **CONFIG)
    made.set_timesteps(18)
    walk = [Level(1 - float(s), float(s)) for s in made.sigmas]
    x = start = noise.start() * walk[0].sigma
    for t, here in zip(made.timesteps, walk, strict=False):
        x0, eps, _ = prior(x, here)
        x = made.step(eps - x0, t, x).prev_sample
    close(sample(prior, start, walk, DPM2M(), noise), x, 1e-5)


def test_second_order(order: Callable[[DPM2M], float]) -> None:
    assert order(DPM2M()) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("first", [Level(0.0, 1.0), Level(0.1, 0.9)])
def test_is_eulers_where_no_slope_is_known(prior: Gaussian, noise: Noise, close: Close, first: Level) -> None:
    """The first step; and after a start at alpha = 0, where h0 is infinite, the second one too."""
    walk = [first, Level(0.3, 0.7), Level(0.6, 0.4), CLEAN]
    pairs = zip(*(list(trajectory(prior, noise.start(), walk, s, noise)) for s in (DPM2M(), Euler())), strict=True)
    same = [bool((a.x - b.x).abs().max() < 1e-12) for a, b in pairs]
    assert same == [True, first.alpha == 0, same[2]]


def test_the_step_into_clean_is_the_last_x0(prior: Gaussian, noise: Noise) -> None:
    last = list(trajectory(prior, noise.start(), levels.trailing(VP.linear(), 5), DPM2M(), noise))[-1]
    assert torch.equal(last.x, last.estimate.x0)


def test_starts_from_noise_of_scale_sigma(noise: Noise) -> None:
    assert torch.equal(DPM2M().start(noise.start(), Level(0.6, 0.8)), noise.start() * 0.8)
