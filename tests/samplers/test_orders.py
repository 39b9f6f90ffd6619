"""Orders of convergence of the samplers on a closed-form prior: of the path on an ODE, of the moments under fresh noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ldm_pipe import CLEAN, VP, Flow, Gaussian, Level, Noise, UsageError, build, levels, sample, trajectory
from ldm_pipe.analysis import outcome
from ldm_pipe.walk import Sampler


def vp(count: int) -> list[Level]:
    """log(alpha / sigma) even in theta^2: uneven steps, the first so small that a start of low order does not show."""
    ends = [math.log((1 - u) / u) for u in (0.97, 0.02)]
    places = [ends[0] + (ends[1] - ends[0]) * (i / count) ** 2 for i in range(count + 1)]
    return [VP.linear().rescale(Level(1.0, math.exp(-p)))[1] for p in places]


def flow(count: int) -> list[Level]:
    """u from .97 to .05 with fine steps at both ends."""
    part = [(i / count) ** 2 * (3 - 2 * i / count) for i in range(count + 1)]
    return [Flow().level(1000 * (0.97 - 0.92 * p)) for p in part]


def error(prior: Gaussian, noise: Noise, sampler: Sampler, walk: list[Level]) -> float:
    """Against the exact flow. The noise of the fixture is never drawn: these are ODE methods."""
    x = noise.start()
    return float((sample(prior, x, walk, sampler, noise) - prior.flow(x, walk[0], walk[-1])).abs().max())


ODE: list[tuple[str, dict[str, Any], float]] = [
    ("euler_ancestral", {"eta": 0.0}, 1),
    ("dpm2", {}, 2),
    ("dpm2_ancestral", {"eta": 0.0}, 2),
    ("dpm2s", {}, 2),
    ("dpm2s", {"r": 0.8}, 2),
    ("dpm3m", {}, 3),
    ("dpm3m", {"rule": "published"}, 2),
    ("dpm_sde", {"eta": 0.0}, 2),
    ("dpm2m_sde", {"eta": 0.0}, 2),
    ("dpm2m_sde", {"eta": 0.0, "solver": "heun"}, 2),
    ("edm_churn", {"gamma": 0.0}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 2, "variant": "bh1"}, 3),
    ("unipc", {"order": 2, "corrector": False}, 2),
    ("unipc", {"order": 3}, 4),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
    ("deis", {"order": 4}, 4),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {"order": 4}, 4),
    ("plms", {"order": 2}, 2),
    ("plms", {"order": 4}, 2),
    ("er_sde", {"order": 2, "scale": "ode"}, 2),
    ("er_sde", {"order": 3, "scale": "ode"}, 3),
    ("sa_solver", {"tau": 0.0, "corrector": 0}, 2),
    ("sa_solver", {"tau": 0.0, "predictor": 3, "corrector": 0}, 3),
    ("sa_solver", {"tau": 0.0, "corrector": 3}, 3),
    ("sa_solver", {"tau": 0.0, "predictor": 3, "corrector": 4}, 4),
]


@pytest.mark.parametrize("walk", [vp, flow])
@pytest.mark.parametrize(("name", "fields", "expected"), ODE)
def test_the_order_on_uneven_levels(
    prior: Gaussian, noise: Noise, name: str, fields: dict[str, Any], expected: float, walk: Any
) -> None:
    """3M as published is at most second order: on the way there its error is not yet a power of the step."""
    coarse, fine = (error(prior, noise, build("sampler", name, **fields), walk(n)) for n in (80, 160))
    within = 0.7 if fields.get("rule") == "published" else 0.35
    assert math.log2(coarse / fine) == pytest.approx(expected, abs=within)


SDE: list[tuple[str, dict[str, Any], float, float]] = [
    ("euler_ancestral", {}, 0.84, 0.13),
    ("dpm2_ancestral", {}, 2.1, 0.017),
    ("dpm_sde", {}, 2.1, 0.0054),
    ("dpm2m_sde", {}, 1.7, 0.0066),
    ("dpm2m_sde", {"solver": "heun"}, 2.0, 0.018),
    ("edm_churn", {"s_noise": 1.0}, 1.6, 0.021),
    ("er_sde", {"order": 1}, 0.9, 0.095),
    ("er_sde", {}, 1.9, 0.019),
    ("er_sde", {"scale": "sde"}, 2.7, 0.0060),
    ("sa_solver", {}, 2.7, 0.026),
    ("sa_solver", {"low": 0.0, "high": 1e9}, 2.6, 0.039),
]


@pytest.mark.parametrize(("name", "fields", "expected", "most"), SDE)
def test_the_moments_approach_the_priors(
    prior: Gaussian, name: str, fields: dict[str, Any], expected: float, most: float
) -> None:
    """From pure noise to u = .1 by exact propagation: the mean is exact at any step, the covariance converges."""
    errors = []
    for count in (12, 24):
        walk = [Flow().level(1000 * (1 - 0.9 * i / count)) for i in range(count + 1)]
        mean, covariance = outcome(prior, walk, build("sampler", name, **fields), (2, 2, 2))
        alpha, sigma = walk[-1]
        assert float((mean - alpha * prior.mean).abs().max()) < 1e-12
        errors.append(float((covariance - alpha**2 * prior.covariance - sigma**2 * torch.eye(8)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.25)
    assert errors[1] < 1.1 * most


FIRST = [
    ("dpm3m", {}),
    ("dpm3m", {"rule": "published"}),
    ("dpm2m_sde", {"eta": 0.0}),
    ("unipc", {"order": 3}),
    ("deis", {}),
    ("deis", {"interpolate": "rho"}),
    ("lms", {}),
    ("plms", {}),
    ("er_sde", {"scale": "ode"}),
    ("sa_solver", {"tau": 0.0}),
]


@pytest.mark.parametrize(("name", "fields"), FIRST)
@pytest.mark.parametrize("first", [Level(0.0, 1.0), Level(0.1, 0.9)])
def test_multistep_is_eulers_where_no_slope_is_known(
    prior: Gaussian, noise: Noise, name: str, fields: dict[str, Any], first: Level
) -> None:
    """The first step; after a start at alpha = 0 the second one too; and into sigma = 0 the end is the last x0."""
    walk = [first, Level(0.3, 0.7), Level(0.6, 0.4), CLEAN]
    ours = list(trajectory(prior, noise.start(), walk, build("sampler", name, **fields), noise))
    euler = list(trajectory(prior, noise.start(), walk, build("sampler", "euler"), noise))
    same = [bool((a.x - b.x).abs().max() < 1e-12) for a, b in zip(ours, euler, strict=True)]
    assert same[:2] == [True, first.alpha == 0]
    assert torch.equal(ours[-1].x, ours[-1].estimate.x0)


ONE = [
    ("unipc", {"order": 1, "corrector": False}),
    ("deis", {"order": 1}),
    ("lms", {"order": 1}),
    ("plms", {"order": 1}),
    ("er_sde", {"order": 1, "scale": "ode"}),
    ("sa_solver", {"predictor": 1, "corrector": 0, "tau": 0.0}),
    ("euler_ancestral", {"eta": 0.0}),
    ("tcd", {"eta": 0.0}),
]


@pytest.mark.parametrize(("name", "fields"), ONE)
def test_order_one_is_euler_to_the_bit(prior: Gaussian, noise: Noise, name: str, fields: dict[str, Any]) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    ours, euler = (
        sample(prior, noise.start(), walk, build("sampler", n, **f), noise) for n, f in ((name, fields), ("euler", {}))
    )
    assert torch.equal(ours, euler)


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("unipc", {"order": 4}, "unipc: order is 4; it takes 1 to 3"),
        ("deis", {"order": 0}, "deis: order is 0; it takes 1 to 4"),
        ("lms", {"order": 5}, "lms: order is 5; it takes 1 to 4"),
        ("plms", {"order": 5}, "plms: order is 5; it takes 1 to 4"),
        ("er_sde", {"order": 4}, "er_sde: order is 4; it takes 1 to 3"),
        ("sa_solver", {"predictor": 4}, "sa_solver: predictor is 4; it takes 1 to 3"),
        ("sa_solver", {"corrector": 1}, "sa_solver: corrector is 1; it takes 0"),
        ("dpm2s", {"r": 0.0}, "dpm2s: r is 0.0; it takes a number above 0"),
        ("tcd", {"eta": 1.5}, "tcd: eta is 1.5; it takes 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build("sampler", name, **fields)
