"""Heun: each of the three averages against its own reference, second order, one evaluation fewer at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Noise, UsageError, levels, sample
from ldm_pipe.samplers.heun import FlowHeun, Heun

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("karras", [False, True])
def test_ve_equals_heuns_scheduler(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, karras: bool
) -> None:
    steps = 12
    made = HeunDiscreteScheduler(
        beta_schedule="scaled_linear", use_karras_sigmas=karras, timestep_spacing="linspace" if karras else "trailing"
    )
    path = table(made)
    made.set_timesteps(steps)
    walk = levels.karras(path, steps) if karras else levels.trailing(path, steps)
    x = noise.start() * walk[0].ratio
    for i, t in enumerate(made.timesteps):
        level = path.rescale(Level(1.0, float(made.sigmas[i])))[1]
        x = made.step(prior(made.scale_model_input(x, t), level).noise, t, x).prev_sample
    sampler = Heun("ve")
    close(sample(prior, sampler.start(noise.start(), walk[0]), walk, sampler, noise), x, 1e-5)


def test_flow_equals_flow_matchings_heun(prior: Gaussian, noise: Noise, close: Close) -> None:
    steps = 12
    made = FlowMatchHeunDiscreteScheduler()
    made.set_timesteps(steps)
    x = noise.start()
    for i, t in enumerate(made.timesteps):
        u = float(made.sigmas[i])
        x0, eps, _ = prior(x, Level(1 - u, u))
        x = made.step(eps - x0, t, x).prev_sample
    walk, sampler = levels.linspace(Flow(), steps), Heun("flow")
    close(sample(prior, sampler.start(noise.start(), walk[0]), walk, sampler, noise), x, 1e-5)


def test_x0_is_the_exponential_integrator_of_the_mean_x0(prior: Gaussian, noise: Noise, close: Close) -> None:
    """alpha' x0 (1 - e^-h) + (sigma' / sigma) x, h the step of log(alpha / sigma): Lu et al. 2022, eq. 9."""
    here, there, x = Level(0.6, 0.8), Level(0.8, 0.6), noise.start()
    h = torch.tensor((there.log_snr - here.log_snr) / 2, dtype=torch.float64)
    ends = [prior(x, here).x0]
    ends.append(prior(there.mix(ends[0], prior(x, here).noise), there).x0)
    expected = there.sigma / here.sigma * x - there.alpha * torch.expm1(-h) * sum(ends) / 2
    close(Heun("x0").step(prior, x, here, there, None, noise.at(0)).x, expected, 1e-12)


@pytest.mark.parametrize("average", ["ve", "flow", "x0"])
def test_second_order(order: Callable[[Heun], float], average: Any) -> None:
    assert order(Heun(average)) == pytest.approx(2, abs=0.1)


def test_ve_cannot_leave_pure_noise(prior: Gaussian, noise: Noise) -> None:
    with pytest.raises(UsageError, match="'ve' cannot leave alpha = 0"):
        sample(prior, noise.start(), levels.linspace(Flow(), 3), Heun("ve"), noise)


def test_the_step_into_clean_is_eulers(prior: Gaussian, noise: Noise) -> None:
    x, here = noise.start(), Level(0.8, 0.6)
    for average in ("ve", "flow", "x0"):
        step = Heun(average).step(prior, x, here, Level(1.0, 0.0), None, noise.at(0))
        assert torch.equal(step.x, prior(x, here).x0)


def test_starts_from_noise_of_scale_sigma(noise: Noise) -> None:
    assert torch.equal(Heun().start(noise.start(), Level(0.6, 0.8)), noise.start() * 0.8)


def test_flow_heun_is_a_name_of_it(prior: Gaussian, noise: Noise) -> None:
    walk = levels.linspace(Flow(), 5)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (Heun("flow"), FlowHeun())))
