"""Euler ancestral: diffusers' scheduler, DDIM with the same eta, Euler at eta 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from torch import Tensor

from ldm_pipe import EPS, VP, Flow, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.euler_ancestral import EulerAncestral

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("steps", [6, 25])
def test_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    made = EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    walk = levels.trailing(table(made), steps)
    made.set_timesteps(steps)
    x = noise.start() * walk[0].ratio
    for i, (t, here) in enumerate(zip(made.timesteps, walk, strict=False)):
        draw = noise.at(i)
        monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda *a, draw=draw, **k: draw("step"))
        out = EPS.target(*prior(made.scale_model_input(x, t).double(), here)[:2], here)
        x = made.step(out, t, x).prev_sample
    sampler = EulerAncestral()
    close(sample(prior, sampler.start(noise.start(), walk[0]), walk, sampler, noise), x, 1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_is_ddim_with_the_same_eta(prior: Gaussian, noise: Noise, close: Close, eta: float) -> None:
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)[1:]):
        ours, ddim = (sample(prior, noise.start(), walk, s, noise) for s in (EulerAncestral(eta), DDIM(eta)))
        close(ours, ddim, 1e-12)


@pytest.mark.parametrize(("eta", "fresh"), [(0.5, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_the_share_of_fresh_noise_out_of_pure_noise(prior: Gaussian, noise: Noise, eta: float, fresh: float) -> None:
    """eta of the deviation, and all of it at most."""
    here, there, x = Level(0.0, 1.0), Level(0.4, 0.6), noise.start()
    x0, eps, _ = prior(x, here)
    mixed = (1 - fresh**2) ** 0.5 * eps + fresh * noise.at(2)("step")
    assert torch.allclose(EulerAncestral(eta).step(prior, x, here, there, None, noise.at(2)).x, 0.4 * x0 + 0.6 * mixed)


def test_starts_from_noise_of_scale_sigma(noise: Noise) -> None:
    assert torch.equal(EulerAncestral().start(noise.start(), Level(0.6, 0.8)), noise.start() * 0.8)
