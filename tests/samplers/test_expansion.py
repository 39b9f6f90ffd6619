"""Polynomials over a step: exact integrals, places met twice but for rounding, levels at both ends."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_pipe import CLEAN, Level
from ldm_pipe.expansion import bend, between, exponential, fall, lebesgue, remember

PLACES = (0.7, 0.4, -0.5, -0.6)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_polynomial_is_integrated_exactly(degree: int) -> None:
    """Through degree + 1 of its values."""
    history = tuple((p, torch.tensor([p**degree], dtype=torch.float64)) for p in PLACES[: degree + 1])
    exact = (1.3 ** (degree + 1) - 0.7 ** (degree + 1)) / (degree + 1) - 0.6 * 0.7**degree
    assert float(bend(history, lebesgue(0.7, 1.3))) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("h", [1e-6, 0.6, 30.0])
@pytest.mark.parametrize("rate", [1.0, -1.0])
def test_a_line_under_an_exponential_weight(h: float, rate: float) -> None:
    """The integral of e^(r (t - h)) t over 0..h is (r h - 1 + e^(-r h)) / r^2."""
    history = ((0.0, torch.zeros(1).double()), (-1.0, -torch.ones(1).double()))
    z = rate * h
    exact = (z + math.expm1(-z)) / rate**2 if h > 1e-3 else h**2 / 2 - rate * h**3 / 6
    assert float(bend(history, exponential(0.0, h, rate))) == pytest.approx(exact, rel=1e-8)


def test_one_value_adds_nothing() -> None:
    assert bend((), lebesgue(0, 1)) == bend(((0.0, torch.ones(1)),), lebesgue(0, 1)) == 0.0


def test_history_is_the_newest_values_each_place_once() -> None:
    values = [torch.tensor(float(k)) for k in range(5)]
    seen = None
    for place, value in zip((3.0, 2.0, 2.0 + 1e-12, 1.0), values, strict=False):
        seen = remember(seen, place, value, 3)
    assert [(round(p, 6), float(v)) for p, v in seen or ()] == [(1.0, 3.0), (2.0, 2.0), (3.0, 0.0)]
    assert [p for p, _ in remember(seen, 0.5, values[4], 2)] == [0.5, 1.0]
    assert remember(seen, math.inf, values[4], 3) == remember(seen, -math.inf, values[4], 3) == ()


def test_the_fall_of_the_ratio() -> None:
    assert fall(Level(0.6, 0.8), Level(0.8, 0.6)) == pytest.approx((0.6 / 0.8) ** 2)
    assert fall(Level(0.0, 1.0), Level(0.5, 0.5)) == fall(Level(0.5, 0.5), CLEAN) == 0
    assert fall(Level(0.0, 1.0), Level(0.0, 2.0)) == 1
    factors = [0.1 + 0.07 * k for k in range(50)]
    assert max(fall(Level(0.3, 0.7), Level(0.3 * f, 0.7 * f)) for f in factors) == 1


def test_between_is_even_in_the_logarithm_of_the_ratio() -> None:
    here, there = Level(0.2, 0.9), Level(0.9, 0.3)
    inside = between(here, there, 0.25)
    assert inside.log_snr == pytest.approx(0.75 * here.log_snr + 0.25 * there.log_snr)
    assert between(here, there, 1.0) == pytest.approx(there)
