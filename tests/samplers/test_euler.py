"""Euler: k-diffusion's rule on VP and flow Euler are one step; both diffusers schedulers, order 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ldm_pipe import EPS, VELOCITY, VP, Flow, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.euler import Euler

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize(
    ("spacing", "steps", "kind"),
    [
        ("trailing", 20, "epsilon"),
        ("leading", 7, "v_prediction"),
        ("karras", 12, "epsilon"),
        ("karras", 30, "v_prediction"),
    ],
)
def test_equals_eulers_scheduler(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, spacing: str, steps: int, kind: str
) -> None:
    config = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing, "steps_offset": 1}
    made = EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type=kind, **config)
    path = table(made)
    made.set_timesteps(steps)
    walk = getattr(levels, spacing)(path, steps)
    assert made.sigmas.tolist() == pytest.approx([lv.ratio for lv in walk], rel=1e-6)
    prediction = EPS if kind == "epsilon" else VELOCITY
    x = noise.start() * walk[0].ratio
    for t, here in zip(made.timesteps, walk, strict=False):
        out = prediction.target(*prior(made.scale_model_input(x, t).double(), here)[:2], here)
        x = made.step(out, t, x).prev_sample
    ours = sample(prior, Euler().start(noise.start(), walk[0]), walk, Euler(), noise)
    close(ours, x, 1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_flow_matchings_scheduler(prior: Gaussian, noise: Noise, close: Close, shift: float) -> None:
    steps = 15
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=np.linspace(1, 1 / 1000, steps))
    walk = levels.flow(Flow(), steps, shift)
    assert made.sigmas.tolist() == pytest.approx([lv.u for lv in walk], abs=1e-6)
    x = noise.start()
    for t, here in zip(made.timesteps, walk, strict=False):
        x0, eps, _ = prior(x, here)
        x = made.step(eps - x0, t, x).prev_sample
    close(sample(prior, Euler().start(noise.start(), walk[0]), walk, Euler(), noise), x, 1e-5)


def test_first_order(order: Callable[[Euler], float]) -> None:
    assert order(Euler()) == pytest.approx(1, abs=0.1)


def test_a_step_is_ddims_with_eta_zero(prior: Gaussian, noise: Noise) -> None:
    walk = levels.trailing(VP.linear(), 6)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (Euler(), DDIM())))


def test_starts_from_noise_of_scale_sigma(noise: Noise) -> None:
    draw = noise.start()
    assert torch.equal(Euler().start(draw, Level(0.6, 0.8)), draw * 0.8)
