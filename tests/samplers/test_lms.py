"""LMS: diffusers' scheduler down to the last positive level, Adams-Bashforth's weights on even steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import LMSDiscreteScheduler
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, trajectory
from ldm_pipe.samplers.lms import LMS
from ldm_pipe.samplers.plms import PLMS

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_diffusers_above_clean(prior: Gaussian, noise: Noise, close: Close, order: int) -> None:
    """Into sigma = 0 it keeps its order, ours does not."""
    made = LMSDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    made.set_timesteps(12)
    walk = [VP.linear().rescale(Level(1.0, float(s)))[1] for s in made.sigmas[:-1]]
    start = LMS().start(noise.start(), walk[0])
    x = noise.start() * walk[0].ratio
    for done, t in zip(trajectory(prior, start, walk, LMS(order), noise), made.timesteps, strict=False):
        seen = prior(made.scale_model_input(x, t).double(), done.here).noise
        x = made.step(seen, t, x, order=order).prev_sample
        close(done.x / done.there.alpha, x, 1e-5)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_even_steps_have_adams_bashforths_weights(prior: Gaussian, noise: Noise, close: Close, order: int) -> None:
    """Which PLMS has on all."""
    walk = [Level(1.0, 3 - 0.25 * i) for i in range(12)]
    for a, b in zip(*(trajectory(prior, noise.start(), walk, s, noise) for s in (LMS(order), PLMS(order))), strict=True):
        close(a.x, b.x, 1e-11)
