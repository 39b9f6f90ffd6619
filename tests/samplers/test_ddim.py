"""DDIM: diffusers where it is right, the paper's formula everywhere, order 1, DDPM at eta 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ldm_pipe import CLEAN_IMAGE, EPS, VELOCITY, VP, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM

KINDS = {"epsilon": EPS, "v_prediction": VELOCITY, "sample": CLEAN_IMAGE}
Close = Callable[[Tensor, Tensor, float], None]
Table = Callable[[Any], VP]


def scheduler(kind: str = "epsilon", **config: Any) -> DDIMScheduler:
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return DDIMScheduler(**stable, clip_sample=False, prediction_type=kind, **config)


def theirs(prior: Gaussian, path: VP, made: DDIMScheduler, kind: str, noise: Noise, eta: float) -> Tensor:
    x = noise.start()
    for i, t in enumerate(made.timesteps.tolist()):
        level = path.level(t)
        out = KINDS[kind].target(*prior(x, level)[:2], level)
        x = made.step(out, t, x, eta=eta, variance_noise=noise.at(i)("step") if eta else None).prev_sample
    return x


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps", "kind"),
    [
        ("leading", 7, "epsilon"),
        ("leading", 50, "v_prediction"),
        ("trailing", 10, "sample"),
        ("trailing", 25, "epsilon"),
    ],
)
def test_equals_diffusers(
    prior: Gaussian, noise: Noise, table: Table, close: Close, eta: float, spacing: str, steps: int, kind: str
) -> None:
    made = scheduler(kind, timestep_spacing=spacing, steps_offset=int(spacing == "leading"))
    path = table(made)
    made.set_timesteps(steps)
    walk = getattr(levels, spacing)(path, steps)
    assert [path.time(lv) for lv in walk[:-1]] == made.timesteps.tolist()
    sampler = DDIM(eta)
    ours = sample(prior, sampler.start(noise.start(), walk[0]), walk, sampler, noise)
    close(ours, theirs(prior, path, made, kind, noise, eta), 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 7), ("trailing", 7), ("trailing", 30), ("quadratic", 9)])
def test_equals_the_formula_where_diffusers_leaves_its_grid(
    prior: Gaussian, noise: Noise, close: Close, eta: float, spacing: str, steps: int
) -> None:
    """Song et al. 2020, eq. 12 and 16, with abar read from the table and the next time from the list."""
    path = VP.scaled_linear()
    walk = getattr(levels, spacing)(path, steps)
    times = [int(path.time(lv)) for lv in walk[:-1]]
    x = noise.start()
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        a, b = path.table[t], path.table[s] if s >= 0 else 1.0
        eps = prior(x, path.level(t)).noise
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        deviation = eta * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
        x = b**0.5 * x0 + (1 - b - deviation**2) ** 0.5 * eps + deviation * noise.at(i)("step")
    close(sample(prior, noise.start(), walk, DDIM(eta), noise), x, 1e-10)


def test_starts_from_noise_of_scale_one_on_the_circle(noise: Noise) -> None:
    """diffusers' init_noise_sigma is 1, whatever the first level."""
    draw = noise.start()
    assert torch.equal(DDIM().start(draw, Level(0.6, 0.8)), draw)
    assert torch.allclose(DDIM().start(draw, Level(3.0, 4.0)), 5 * draw)


def test_first_order(order: Callable[[DDIM], float]) -> None:
    assert order(DDIM()) == pytest.approx(1, abs=0.1)


def test_eta_one_is_ddpm_with_the_small_variance(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.leading(VP.linear(), 20)
    pairs = zip(
        trajectory(prior, noise.start(), walk, DDIM(1.0), noise),
        trajectory(prior, noise.start(), walk, DDPM("small"), noise),
        strict=True,
    )
    for a, b in pairs:
        close(a.x, b.x, 1e-12)
