"""DPM-Solver++(2S): diffusers' singlestep scheduler, Heun's average of x0 at r = 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from torch import Tensor

from ldm_pipe import CLEAN, VP, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.dpm2s import DPM2S
from ldm_pipe.samplers.heun import Heun

Close = Callable[[Tensor, Tensor, float], None]


def test_equals_diffusers_on_even_steps_of_lambda(prior: Gaussian, noise: Noise, close: Close) -> None:
    """Its inner level is the next of the list, which lies halfway on even steps; the odd last step goes into sigma = 0."""
    made = DPMSolverSinglestepScheduler(
        beta_schedule="scaled_linear", solver_order=2, use_exponential_sigmas=True, lower_order_final=True
    )
    made.set_timesteps(13)
    every = [*(VP.linear().rescale(Level(1.0, float(s)))[1] for s in made.sigmas[:-1]), CLEAN]
    x = start = DPM2S().start(noise.start(), every[0])
    theirs = []
    for t, here in zip(made.timesteps, every, strict=False):
        x = made.step(prior(x, here).noise, t, x).prev_sample
        theirs.append(x)
    walk = [*every[::2], CLEAN]
    for done in trajectory(prior, start, walk, DPM2S(), noise):
        close(done.x, theirs[min(2 * done.number + 1, 12)], 1e-5)


def test_r_one_is_heuns_average_of_x0(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    close(*(sample(prior, noise.start(), walk, s, noise) for s in (DPM2S(1.0), Heun("x0"))), 1e-12)


@pytest.mark.parametrize("r", [0.3, 0.5])
def test_a_step_is_algorithm_one(prior: Gaussian, noise: Noise, close: Close, r: float) -> None:
    """Lu et al. 2022, lines 4 to 7, with exponentials of lambda."""
    here, there, x = Level(0.6, 0.8), Level(0.8, 0.6), noise.start()
    h = torch.tensor((there.log_snr - here.log_snr) / 2, dtype=torch.float64)
    ratio = here.ratio * float(torch.exp(-r * h))
    middle = VP.linear().rescale(Level(1.0, ratio))[1]
    x0 = prior(x, here).x0
    u = middle.sigma / here.sigma * x - middle.alpha * torch.expm1(-r * h) * x0
    d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * prior(u, middle).x0
    expected = there.sigma / here.sigma * x - there.alpha * torch.expm1(-h) * d
    close(DPM2S(r).step(prior, x, here, there, None, noise.at(0)).x, expected, 1e-12)
