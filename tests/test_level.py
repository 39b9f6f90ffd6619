"""Levels: one convention, exact at both ends, the same place at every scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe import CLEAN, Level

positive = st.floats(1e-3, 1e3)


@settings(deadline=None, max_examples=60)
@given(alpha=positive, sigma=positive, factor=positive)
def test_a_place_does_not_depend_on_the_scale(alpha: float, sigma: float, factor: float) -> None:
    level, other = Level(alpha, sigma), Level(alpha * factor, sigma * factor)
    assert other.u == pytest.approx(level.u)
    assert other.log_snr == pytest.approx(level.log_snr, abs=1e-9)
    assert other.ratio == pytest.approx(level.ratio)
    assert level.log_snr == pytest.approx(math.log(alpha**2 / sigma**2), abs=1e-9)
    assert level.ratio == pytest.approx(level.u / (1 - level.u))


def test_both_ends_are_legal() -> None:
    pure = Level(0.0, 1.0)
    assert (pure.log_snr, pure.u, pure.ratio) == (-math.inf, 1, math.inf)
    assert (CLEAN.log_snr, CLEAN.u, CLEAN.ratio) == (math.inf, 0, 0)
    x, x0 = torch.full((1, 1, 2, 2), 3.0), torch.ones(1, 1, 2, 2)
    assert torch.equal(CLEAN.noise(x, x0), torch.zeros_like(x))
    assert torch.equal(pure.noise(x, x0), x)
    assert torch.equal(CLEAN.mix(x0, x), x0)
    assert torch.equal(pure.mix(x0, x), x)


def test_mix_and_noise_are_inverse() -> None:
    x0, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = Level(0.7, 0.4)
    assert torch.allclose(level.mix(x0, noise), 0.7 * x0 + 0.4 * noise)
    assert torch.allclose(level.noise(level.mix(x0, noise), x0), noise)
