"""Distances and costs of samplers: exact where they are linear, near it where they are drawn, evaluations counted."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import VP, Gaussian, Level, UsageError, build, levels
from ldm_pipe.analysis import cost, distance, efficiency, gaussian_w2, outcome

INDEX = torch.arange(4, dtype=torch.float64)
PRIOR = Gaussian(INDEX.sin(), 0.9 ** (INDEX[:, None] - INDEX).abs())
WALK = levels.trailing(VP.linear(), 8)


@pytest.mark.parametrize(
    ("name", "fields", "evaluations", "draws"),
    [
        ("ddim", {}, 8, False),
        ("ddim", {"eta": 1.0}, 8, True),
        ("heun", {}, 15, False),
        ("score_sde", {"corrections": 2}, 22, True),
        ("restart", {"times": 1, "inner": 3}, 15 + 6, True),
        ("ddpm", {"variance": "learned"}, 8, True),
    ],
)
def test_a_walk_costs_what_it_asks(name: str, fields: dict[str, object], evaluations: int, draws: bool) -> None:
    assert cost(PRIOR, build("sampler", name, **fields), WALK) == (evaluations, draws)


def test_a_linear_sampler_is_measured_exactly() -> None:
    sampler = build("sampler", "ddpm")
    right = PRIOR.mean, PRIOR.covariance
    assert distance(PRIOR, sampler, WALK) == gaussian_w2(outcome(PRIOR, WALK, sampler, (4, 1, 1)), right)
    part = WALK[:5]
    a, s = part[-1]
    marginal = a * PRIOR.mean, a * a * PRIOR.covariance + s * s * torch.eye(4, dtype=torch.float64)
    found = distance(PRIOR, sampler, part)
    assert found == gaussian_w2(outcome(PRIOR, part, sampler, (4, 1, 1)), marginal)


def test_another_one_by_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ODE's end is nearly the prior; a Langevin corrector of no strength leaves the predictor's distance."""
    monkeypatch.setattr(efficiency, "DRAWS", 20_000)
    walk = [Level(0.0, 1.0), Level(1.0, 0.0)]
    assert distance(PRIOR, build("sampler", "ode"), walk) < 0.04
    exact = distance(PRIOR, build("sampler", "score_sde", corrections=0), WALK)
    drawn = distance(PRIOR, build("sampler", "score_sde", corrections=1, snr=1e-6), WALK)
    assert drawn == pytest.approx(exact, abs=0.03)


def test_other_faults_are_not_hidden() -> None:
    with pytest.raises(UsageError, match="alpha = 0"):
        distance(PRIOR, build("sampler", "heun", average="ve"), [Level(0.0, 1.0), Level(0.5, 0.5), Level(1.0, 0.0)])
