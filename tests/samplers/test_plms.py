"""PLMS and iPNDM: both diffusers schedulers where they are right, and second order whatever the number of noises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import IPNDMScheduler, PNDMScheduler
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, build, trajectory
from ldm_pipe.samplers.plms import PLMS

Close = Callable[[Tensor, Tensor, float], None]


def test_equals_pndm_after_its_start(prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close) -> None:
    """Its start takes another evaluation; here it is given the three noises of ours. Four values from there on."""
    made = PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)
    path = table(made)
    made.set_timesteps(10)
    times = list(range(901, 0, -100))
    done = list(trajectory(prior, noise.start(), [path.level(t) for t in times], PLMS(), noise))
    made.ets, made.counter = [d.estimate.noise for d in done[:3]], 10
    x = done[2].x
    for step, t in zip(done[3:], times[3:], strict=False):
        x = made.step(prior(x, step.here).noise, t, x).prev_sample
        close(step.x, x, 1e-9)


def test_equals_ipndm_below_pure_noise(prior: Gaussian, noise: Noise, close: Close) -> None:
    """From its second level to the last positive one: at alpha = 0 it takes x0 for 0. Its network predicts v."""
    made = IPNDMScheduler()
    made.set_timesteps(12)
    made.set_begin_index(1)
    walk = [Level(float(a), float(s)) for a, s in zip(made.alphas, made.betas, strict=True)][1:-1]
    x = noise.start()
    for step, t in zip(trajectory(prior, x, walk, PLMS(), noise), made.timesteps[1:], strict=False):
        x0, eps, _ = prior(x, step.here)
        x = made.step(step.here.alpha * eps - step.here.sigma * x0, t, x).prev_sample
        close(step.x, x, 1e-5)


def test_ipndm_is_another_name() -> None:
    assert build("sampler", "ipndm") == build("sampler", "plms") == PLMS()
