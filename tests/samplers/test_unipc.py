"""UniPC: diffusers' scheduler for every order and B(h), DPM-Solver++(2M) as its predictor, edits of x that stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from ldm_pipe import CLEAN, VP, Flow, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.unipc import UniPC

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equals_diffusers(prior: Gaussian, noise: Noise, close: Close, order: int, variant: Any, corrector: bool) -> None:
    """Its order falls before the end (`lower_order_final`), ours only into sigma = 0, where its bh1 is not a number."""
    steps = 12
    made = UniPCMultistepScheduler(
        beta_schedule="scaled_linear", solver_order=order, solver_type=variant, timestep_spacing="trailing",
        disable_corrector=[] if corrector else list(range(steps)),
    )  # fmt: skip
    made.set_timesteps(steps)
    walk = [*(VP.linear().rescale(Level(1.0, float(s)))[1] for s in made.sigmas[:-1]), CLEAN]
    sampler = UniPC(order, variant, corrector)
    x = start = sampler.start(noise.start(), walk[0])
    ours = trajectory(prior, start, walk, sampler, noise)
    for done, t in zip(ours, made.timesteps, strict=True):
        x = made.step(prior(x, done.here).noise, t, x).prev_sample
        right = done.there.sigma != 0 or variant == "bh2"
        if right and (done.number <= steps - order or order < 3):
            close(done.x, x, 1e-5)


def test_the_predictor_of_order_two_is_2m(prior: Gaussian, noise: Noise, close: Close) -> None:
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)):
        ours, twom = (sample(prior, noise.start(), walk, s, noise) for s in (UniPC(corrector=False), DPM2M()))
        close(ours, twom, 1e-12)


def test_the_corrector_adds_to_x_and_forgets_no_edit(prior: Gaussian, noise: Noise, close: Close) -> None:
    """An x that was changed between two steps by what the estimates do not see arrives changed by as much, scaled."""
    walk = [Level(0.3, 0.7), Level(0.5, 0.5), Level(0.7, 0.3)]
    first = next(iter(trajectory(prior, noise.start(), walk, UniPC(), noise)))
    still = prior(first.x, walk[1])
    plain, moved = (
        UniPC().step(lambda x, level: still._replace(noise=level.noise(x, still.x0)), x, *walk[1:], first.memory, noise.at(1)).x
        for x in (first.x, first.x + 1)
    )
    assert torch.allclose(moved - plain, torch.full_like(plain, 0.3 / 0.5), atol=1e-12)
