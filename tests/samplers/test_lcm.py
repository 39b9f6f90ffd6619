"""LCM: diffusers' scheduler on both paths, DDRM's kernel with eta 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from diffusers.schedulers import scheduling_lcm
from torch import Tensor

from ldm_pipe import CLEAN, VP, Gaussian, Noise, levels, sample
from ldm_pipe.samplers.lcm import LCM
from ldm_pipe.samplers.renoise import Renoise

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Callable[[Any], VP], close: Close, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Its boundary weights differ from 0 and 1 by 1e-6 at these times."""
    made = LCMScheduler(beta_schedule="scaled_linear")
    path = table(made)
    made.set_timesteps(steps, original_inference_steps=50)
    walk = [*(path.level(int(t)) for t in made.timesteps), CLEAN]
    x = start = LCM().start(noise.start(), walk[0])
    for i, (t, here) in enumerate(zip(made.timesteps, walk, strict=False)):
        draw = noise.at(i)
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *a, draw=draw, **k: draw("step"))
        x = made.step(prior(x, here).noise, t, x).prev_sample
    close(sample(prior, start, walk, LCM(), noise), x, 1e-5)


def test_is_the_kernel_of_ddrm_with_eta_one(prior: Gaussian, noise: Noise) -> None:
    walk = levels.trailing(VP.scaled_linear(), 4)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (LCM(), Renoise(1.0))))
