"""DEIS: diffusers' scheduler for log rho, LMS for rho."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import DEISMultistepScheduler
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.deis import DEIS
from ldm_pipe.samplers.lms import LMS

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_diffusers(prior: Gaussian, noise: Noise, close: Close, order: int) -> None:
    """To its last level, which lies above sigma = 0."""
    made = DEISMultistepScheduler(
        beta_schedule="scaled_linear", solver_order=order, timestep_spacing="trailing", lower_order_final=False
    )
    made.set_timesteps(16)
    walk = [VP.linear().rescale(Level(1.0, float(s)))[1] for s in made.sigmas]
    x = start = DEIS().start(noise.start(), walk[0])
    for done, t in zip(trajectory(prior, start, walk, DEIS(order), noise), made.timesteps, strict=True):
        x = made.step(prior(x, done.here).noise, t, x).prev_sample
        close(done.x, x, 1e-5)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_over_rho_it_is_lms(prior: Gaussian, noise: Noise, close: Close, order: int) -> None:
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)):
        ours, lms = (sample(prior, noise.start(), walk, s, noise) for s in (DEIS(order, "rho"), LMS(order)))
        close(ours, lms, 1e-12)
