"""TCD: diffusers' scheduler and DDIM at eta 0, LCM at eta 1, its own rule on the flow path between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import TCDScheduler
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.lcm import LCM
from ldm_pipe.samplers.tcd import TCD

Close = Callable[[Tensor, Tensor, float], None]


def test_equals_diffusers_at_eta_zero(prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close) -> None:
    made = TCDScheduler(beta_schedule="scaled_linear")
    path = table(made)
    made.set_timesteps(4, original_inference_steps=50)
    times = made.timesteps.tolist()
    x = start = TCD().start(noise.start(), path.level(times[0]))
    for t in times[:-1]:
        x = made.step(prior(x, path.level(t)).noise, t, x, eta=0.0).prev_sample
    walk = [path.level(t) for t in times]
    close(sample(prior, start, walk, TCD(0.0), noise), x, 1e-9)


@pytest.mark.parametrize(("eta", "same"), [(0.0, DDIM()), (1.0, LCM())])
def test_ends_at_ddim_and_lcm(prior: Gaussian, noise: Noise, eta: float, same: Any) -> None:
    walk = levels.trailing(VP.scaled_linear(), 4)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (TCD(eta), same)))


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_a_step_on_the_flow_path_is_strategic_sampling(prior: Gaussian, noise: Noise, close: Close, eta: float) -> None:
    """To (1 - eta) of the next time, then the forward process q(x_t | x_s) of x = (1 - u) x0 + u noise."""
    here, there, x = Level(0.2, 0.8), Level(0.5, 0.5), noise.start()
    u = (1 - eta) * 0.5
    x0, eps, _ = prior(x, here)
    low = (1 - u) * x0 + u * eps
    shrink = 0.5 / (1 - u)
    expected = shrink * low + (0.5**2 - (shrink * u) ** 2) ** 0.5 * noise.at(3)("step")
    close(TCD(eta).step(prior, x, here, there, None, noise.at(3)).x, expected, 1e-12)
