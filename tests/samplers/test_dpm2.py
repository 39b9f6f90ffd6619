"""DPM2 and DPM2 ancestral: diffusers' two schedulers down to the last positive level, and each other at eta 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers.schedulers import scheduling_k_dpm_2_ancestral_discrete
from torch import Tensor

from ldm_pipe import CLEAN, VP, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.dpm2 import DPM2, DPM2Ancestral
from ldm_pipe.samplers.euler_ancestral import EulerAncestral

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("ancestral", [False, True])
def test_equals_diffusers_above_clean(
    prior: Gaussian, noise: Noise, close: Close, monkeypatch: pytest.MonkeyPatch, ancestral: bool
) -> None:
    """Two calls a step; the second one's level is the middle in log(sigma / alpha)."""
    steps = 8
    made = (KDPM2AncestralDiscreteScheduler if ancestral else KDPM2DiscreteScheduler)(
        beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    made.set_timesteps(steps)
    walk = [VP.linear().rescale(Level(1.0, float(s)))[1] for s in [made.sigmas[0], *made.sigmas[1:-3:2]]]
    sampler = DPM2Ancestral() if ancestral else DPM2()
    x = noise.start() * walk[0].ratio
    times = iter(made.timesteps)
    for done in trajectory(prior, sampler.start(noise.start(), walk[0]), walk, sampler, noise):
        draw = noise.at(done.number)
        monkeypatch.setattr(scheduling_k_dpm_2_ancestral_discrete, "randn_tensor", lambda *a, draw=draw, **k: draw("step"))
        below = done.there.ratio
        if ancestral:
            below = done.there.ratio**2 / done.here.ratio
        for ratio in (done.here.ratio, (done.here.ratio * below) ** 0.5):
            t = next(times)
            level = VP.linear().rescale(Level(1.0, ratio))[1]
            x = made.step(prior(made.scale_model_input(x, t).double(), level).noise, t, x).prev_sample
        close(done.x / done.there.alpha, x, 1e-5)
    assert len(walk) == steps


def test_ancestral_with_eta_zero_is_dpm2(prior: Gaussian, noise: Noise) -> None:
    walk = levels.trailing(VP.scaled_linear(), 7)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (DPM2Ancestral(0.0), DPM2())))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_end_points_are_euler_ancestrals(prior: Gaussian, noise: Noise, close: Close, eta: float) -> None:
    x = noise.start()
    for here, there in ((Level(0.0, 1.0), Level(0.4, 0.6)), (Level(0.4, 0.6), CLEAN)):
        ours, euler = (s.step(prior, x, here, there, None, noise.at(1)).x for s in (DPM2Ancestral(eta), EulerAncestral(eta)))
        close(ours, euler, 1e-12)


def test_the_middle_lies_between_the_levels(prior: Gaussian, noise: Noise) -> None:
    asked: list[Level] = []

    def denoise(x: Tensor, level: Level) -> object:
        asked.append(level)
        return prior(x, level)

    DPM2().step(denoise, noise.start(), Level(0.4, 0.9), Level(0.9, 0.4), None, noise.at(0))  # type: ignore[arg-type]
    assert asked[1] == pytest.approx((0.6, 0.6))
