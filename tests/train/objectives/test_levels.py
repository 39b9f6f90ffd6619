"""The level distributions have the distribution functions of their papers, and stay on a table's entries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from ldm_pipe.level import Level
from ldm_pipe.path import EDM, VP, Flow
from train.objectives.levels import LEVELS, Beta, Cubic, Levels, LogitNormal, LogNormal, Mode, Uniform

COUNT = 4000
# Standard normal draws at the quantiles: a distribution is then met without sampling error.
NORMAL = torch.special.ndtri((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT)
TABLE = VP.scaled_linear()


def expect(levels: Levels, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    u = levels(NORMAL, Flow()).u.flatten().numpy()
    assert np.abs(cdf(np.sort(u)) - (np.arange(COUNT) + 0.5) / COUNT).max() < 2e-3


def test_uniform_on_the_flow_path() -> None:
    expect(Uniform(), lambda u: u)


def test_uniform_visits_every_entry_of_a_table_alike() -> None:
    level = Uniform()(NORMAL, TABLE)
    alphas, counts = level.alpha.flatten().unique(return_counts=True)
    assert len(alphas) == len(TABLE.table)
    assert counts.min() == counts.max() == 4
    assert torch.allclose(alphas.square(), torch.tensor(TABLE.table[::-1], dtype=torch.float64))


def test_logit_normal() -> None:
    expect(LogitNormal(0.5, 1.2), lambda u: stats.norm.cdf((np.log(u / (1 - u)) - 0.5) / 1.2))


def test_beta() -> None:
    expect(Beta(1.5, 1.0), lambda u: u**1.5)
    expect(Beta(2.0, 3.0), stats.beta(2, 3).cdf)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 1.75])
def test_mode_has_the_density_of_its_inverse(scale: float) -> None:
    def cdf(u: np.ndarray) -> np.ndarray:  # u falls in q, so P(u' < u) = 1 - q(u), by bisection
        low, high = np.zeros_like(u), np.ones_like(u)
        for _ in range(60):
            q = (low + high) / 2
            above = 1 - q - scale * (np.cos(math.pi * q / 2) ** 2 - 1 + q) > u
            low, high = np.where(above, q, low), np.where(above, high, q)
        return 1 - low

    expect(Mode(scale), cdf)


def test_cubic_is_one_minus_the_cube_of_a_uniform_time() -> None:
    """P(time < u) = 1 - (1 - u)^(1/3), on the flow path and in the counts of a table's entries."""
    expect(Cubic(), lambda u: 1 - np.cbrt(1 - u))
    level = Cubic()(NORMAL, TABLE)
    times = np.array([TABLE.time(Level(float(a), float(s))) for a, s in zip(level.alpha, level.sigma, strict=True)])
    for share in (0.2, 0.5, 0.9):
        assert (times < share * 1000 - 0.5).mean() == pytest.approx(1 - (1 - share) ** (1 / 3), abs=2e-3)
    assert (times >= 874.5).mean() == pytest.approx(0.5, abs=2e-3)


def test_mode_favours_the_middle() -> None:
    u = Mode(1.29)(NORMAL, Flow()).u
    assert (u.sub(0.5).abs() < 0.25).double().mean() > 0.6


def test_log_normal_is_edms() -> None:
    level = LogNormal()(NORMAL, EDM())
    log = (level.sigma / level.alpha).log().flatten()
    assert log.mean().item() == pytest.approx(-1.2, abs=1e-6)
    assert log.std().item() == pytest.approx(1.2, rel=2e-3)


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_a_table_is_only_visited_at_its_entries(name: str) -> None:
    level = LEVELS[name]()(NORMAL[::20].float(), TABLE)
    known = torch.tensor(TABLE.table).sqrt()
    assert (level.alpha.flatten()[:, None] - known).abs().min(1).values.max() < 1e-6
    assert torch.allclose(level.alpha.square() + level.sigma.square(), torch.ones(1))


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_more_draw_is_more_noise(name: str) -> None:
    u = LEVELS[name]()(NORMAL[::100], Flow()).u.flatten()
    assert (u.diff() > 0).all()
    assert u.min() > 0
    assert u.max() < 1
