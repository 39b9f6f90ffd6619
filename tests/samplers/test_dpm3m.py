"""DPM-Solver++(3M): as published diffusers' scheduler; exact the polynomial solver of UniPC without its corrector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ldm_pipe import EPS, VP, Gaussian, Noise, levels, sample, trajectory
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.dpm3m import DPM3M
from ldm_pipe.samplers.unipc import UniPC

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 6), ("leading", 25), ("linspace", 16)])
def test_as_published_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, spacing: str, steps: int
) -> None:
    made = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", solver_order=3, lower_order_final=False, final_sigmas_type="zero"
    )
    path = table(made)
    walk = getattr(levels, spacing)(path, steps)
    made.set_timesteps(timesteps=[int(path.time(lv)) for lv in walk[:-1]])
    x = start = DPM3M().start(noise.start(), walk[0])
    for t, here in zip(made.timesteps, walk, strict=False):
        x = made.step(EPS.target(*prior(x, here)[:2], here), t, x).prev_sample
    close(sample(prior, start, walk, DPM3M("published"), noise), x, 1e-5)


def test_exact_is_the_third_order_predictor(prior: Gaussian, noise: Noise, close: Close) -> None:
    """From the third step on; before it, UniPC has its own weights. Here by Newton's form, there by quadrature."""
    walk = levels.trailing(VP.scaled_linear(), 9)
    steps = list(trajectory(prior, noise.start(), walk, DPM3M(), noise))
    for done in steps[2:]:
        before = steps[done.number - 1]
        unipc = UniPC(order=3, corrector=False).step(prior, before.x, done.here, done.there, (before.memory, 0.0), noise.at(0))
        close(done.x, unipc.x, 1e-11)


def test_the_published_second_step_is_2m(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    ours, twom, exact = (list(trajectory(prior, noise.start(), walk, s, noise)) for s in (DPM3M("published"), DPM2M(), DPM3M()))
    close(ours[1].x, twom[1].x, 1e-12)
    assert float((exact[1].x - twom[1].x).abs().max()) > 1e-4
