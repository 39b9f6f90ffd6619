"""SDE-DPM-Solver++(2M): diffusers' scheduler in both kinds, DPM-Solver++(2M) at eta 0, DDIM where no slope is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ldm_pipe import EPS, VP, Flow, Gaussian, Noise, levels, sample, trajectory
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.dpm2m_sde import DPM2MSDE

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 6), ("leading", 25)])
def test_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, spacing: str, steps: int, solver: Any
) -> None:
    made = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++", solver_type=solver, final_sigmas_type="zero"
    )
    path = table(made)
    walk = getattr(levels, spacing)(path, steps)
    made.set_timesteps(timesteps=[int(path.time(lv)) for lv in walk[:-1]])
    x = start = DPM2MSDE().start(noise.start(), walk[0])
    for i, (t, here) in enumerate(zip(made.timesteps, walk, strict=False)):
        x = made.step(EPS.target(*prior(x, here)[:2], here), t, x, variance_noise=noise.at(i)("step")).prev_sample
    close(sample(prior, start, walk, DPM2MSDE(solver=solver), noise), x, 1e-5)


def test_eta_zero_is_2m(prior: Gaussian, noise: Noise, close: Close) -> None:
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)):
        ours, twom = (sample(prior, noise.start(), walk, s, noise) for s in (DPM2MSDE(0.0), DPM2M()))
        close(ours, twom, 1e-12)


def test_the_first_step_is_ddims_with_eta_one(prior: Gaussian, noise: Noise, close: Close) -> None:
    """At eta 1 the reverse SDE with a still x0 is DDPM's posterior."""
    walk = levels.leading(VP.linear(), 9)
    ours, ddim = (list(trajectory(prior, noise.start(), walk, s, noise)) for s in (DPM2MSDE(), DDIM(1.0)))
    close(ours[0].x, ddim[0].x, 1e-12)
    assert float((ours[1].x - ddim[1].x).abs().max()) > 1e-3
