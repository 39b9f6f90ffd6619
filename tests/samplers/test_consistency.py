"""Consistency sampling: diffusers' scheduler on an EDM network, LCM's without a minimum, the boundary condition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import CMStochasticIterativeScheduler
from diffusers.schedulers import scheduling_consistency_models
from torch import Tensor

from ldm_pipe import CLEAN, EDM, VELOCITY, VP, Cond, Gaussian, Level, Model, Noise, UsageError, levels, sample
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.samplers.consistency import Consistency
from ldm_pipe.samplers.lcm import LCM

Close = Callable[[Tensor, Tensor, float], None]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_diffusers(prior: Gaussian, noise: Noise, close: Close, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Its own weights of the raw output F of an EDM network."""
    made = CMStochasticIterativeScheduler(clip_denoised=False)
    made.set_timesteps(steps)
    walk = [*(Level(1.0, float(s)) for s in made.sigmas[:steps]), CLEAN]
    model = Model(ExactNetwork((prior,), EDM(), VELOCITY), EDM(), VELOCITY)
    x = start = Consistency().start(noise.start(), walk[0])
    for i, (t, here) in enumerate(zip(made.timesteps, walk, strict=False)):
        draw = noise.at(i)
        monkeypatch.setattr(scheduling_consistency_models, "randn_tensor", lambda *a, draw=draw, **k: draw("step"))
        made.is_scale_input_called = True
        raw = -model.raw(x, here, Cond())[1]  # EDM's F is -v
        x = made.step(raw, t, x).prev_sample
    ours = sample(model.bind(Cond()), start, walk, Consistency(boundary=True), noise)
    close(ours, x, 2e-5)


def test_without_a_minimum_it_is_lcm(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 4)
    for boundary in (False, True):
        ours, lcm = (sample(prior, noise.start(), walk, s, noise) for s in (Consistency(0.0, boundary), LCM()))
        close(ours, lcm, 1e-12)


def test_at_the_minimum_nothing_is_changed(prior: Gaussian, noise: Noise, close: Close) -> None:
    """f(y, sigma_min) = y, whatever the network says."""
    x, here = noise.start(), Level(0.7, 0.7 * 0.3)
    close(Consistency(0.3, True).step(prior, x, here, CLEAN, None, noise.at(0)).x, x / 0.7, 1e-12)
    close(Consistency(0.3, True).step(prior, x, here, Level(1.0, 0.3), None, noise.at(0)).x, x / 0.7, 1e-12)


@pytest.mark.parametrize("fields", [{"sigma_min": -0.1}, {"sigma_min": 1.0}, {"data_std": 0.0}])
def test_fields_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="consistency"):
        Consistency(**fields)  # type: ignore[arg-type]
