"""SA-Solver: diffusers' scheduler for every pair of orders and tau, UniPC at tau 0, noise only inside its interval."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import SASolverScheduler
from diffusers.schedulers import scheduling_sasolver
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.sa_solver import SASolver
from ldm_pipe.samplers.unipc import UniPC

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 2), (2, 2), (2, 3), (3, 3), (3, 4)])
def test_equals_diffusers(
    prior: Gaussian,
    noise: Noise,
    close: Close,
    monkeypatch: pytest.MonkeyPatch,
    predictor: int,
    corrector: int,
    tau: float,
) -> None:
    """To its last level, which lies above sigma = 0."""
    made = SASolverScheduler(
        beta_schedule="scaled_linear", predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: tau,
        timestep_spacing="trailing", lower_order_final=False,
    )  # fmt: skip
    made.set_timesteps(8)
    made.sigmas = made.sigmas.double()
    walk = [VP.linear().rescale(Level(1.0, float(s)))[1] for s in made.sigmas]
    sampler = SASolver(predictor, corrector, tau, low=0.0, high=1e9)
    x = start = sampler.start(noise.start(), walk[0])
    for done, t in zip(trajectory(prior, start, walk, sampler, noise), made.timesteps, strict=True):
        draw = noise.at(done.number)
        monkeypatch.setattr(scheduling_sasolver, "randn_tensor", lambda *a, draw=draw, **k: draw("step"))
        x = made.step(prior(x, done.here).noise, t, x).prev_sample
        close(done.x, x, 1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_noise_it_is_unipc_with_bh1(prior: Gaussian, noise: Noise, close: Close, order: int) -> None:
    """Whose corrector has one value more than its predictor."""
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)):
        both = SASolver(order, order + 1, 0.0), UniPC(order, "bh1")
        close(*(sample(prior, noise.start(), walk, s, noise) for s in both), 1e-12)


def test_order_one_with_tau_one_is_ddim_with_eta_one(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.leading(VP.linear(), 9)
    both = SASolver(1, 0, 1.0, 0.0, 1e9), DDIM(1.0)
    close(*(sample(prior, noise.start(), walk, s, noise) for s in both), 1e-12)


@pytest.mark.parametrize(("ratio", "drawn"), [(0.49, False), (0.5, True), (2.0, True), (2.01, False)])
def test_noise_is_drawn_within_the_interval_only(prior: Gaussian, noise: Noise, ratio: float, drawn: bool) -> None:
    here, there, x = Level(1.0, ratio), Level(1.0, 0.3), noise.start()
    ends = [SASolver(low=0.5, high=2.0).step(prior, x, here, there, None, noise.at(i)).x for i in (0, 1)]
    assert torch.equal(*ends) is not drawn
