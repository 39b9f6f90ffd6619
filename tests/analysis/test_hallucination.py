"""The score is the variance of the last estimates; it finds a sample whose estimate wavers and tells when it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, UsageError, build, levels
from ldm_pipe.analysis.hallucination import FINE, dense_tail, fine_end, keep, scores
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Step, trajectory

LEVELS = [Level(k / 20, 1 - k / 20) for k in range(21)]


def steps(values: torch.Tensor) -> list[Step]:
    """values: [steps,B,D], one estimate for each level but the last."""
    return [Step(v, Estimate(v, v), None, here, there) for v, here, there in zip(values, LEVELS, LEVELS[1:], strict=False)]


def test_it_is_the_variance_over_the_last_levels() -> None:
    values = torch.randn(20, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = scores(steps(values), below=0.25)
    torch.testing.assert_close(found, values[15:].var(0, correction=0).mean(1))
    torch.testing.assert_close(scores(steps(values), below=1.0), values.var(0, correction=0).mean(1))


def test_what_wavers_is_dropped() -> None:
    values = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)).expand(20, -1, -1).clone().double()
    values[:, 7] += torch.linspace(0, 1, 20)[:, None]
    values[:10] += torch.randn(10, 50, 4).double()  # earlier levels say nothing
    kept = keep(scores(steps(values), below=0.5), 0.98)
    assert kept.tolist() == [k != 7 for k in range(50)]


def test_a_walk_too_short_is_told() -> None:
    with pytest.raises(UsageError, match=r"2 step\(s\) have a noise"):
        scores(steps(torch.zeros(20, 1, 1)), below=0.11)
    with pytest.raises(UsageError, match="above 0, at most 1"):
        keep(torch.zeros(3), 0.0)


def test_a_dense_tail_goes_on_where_the_walk_is() -> None:
    walk, tail = LEVELS[::5], [Level(1 - k / 100, k / 100) for k in (9, 6, 3, 0)]
    found = dense_tail(walk, tail)
    assert found == [*walk[:-1], *tail]
    assert [float(level.u) for level in found] == sorted((float(level.u) for level in found), reverse=True)


MODES, SPREAD, MANY = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), 0.05, 14_000
POINTS, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(7))


class Draws:
    """One generator a step: fourteen thousand numbers, where a seed for each would take long."""

    def at(self, index: int) -> StepNoise:
        generator = torch.Generator().manual_seed(100_003 + index)
        return lambda tag="step": torch.randn(MANY, 1, 1, 1, generator=generator, dtype=torch.float64)


def toy(width: float, walk: list[Level]) -> Iterator[Step]:
    """Ancestral samples of three modes on a line from their exact denoiser, smoothed over x by a Gaussian of some width: a
    network is smooth, and that alone is what makes samples between the modes."""

    def exact(x: Tensor, level: Level) -> Tensor:
        variance = (level.alpha * SPREAD) ** 2 + level.sigma**2
        off = x[..., None] - level.alpha * MODES
        share = torch.softmax(-off.square() / (2 * variance), -1)
        return (share * (MODES + level.alpha * SPREAD**2 / variance * off)).sum(-1)

    def smooth(x: Tensor, level: Level) -> Estimate:
        x0 = (exact(x[..., None] + width * POINTS, level) * WEIGHTS).sum(-1) / WEIGHTS.sum()
        return Estimate(x0, level.noise(x, x0))

    return trajectory(smooth, Draws().at(-1)(), walk, build("sampler", "ddpm"), Draws())


def test_between_three_modes_nine_of_ten_are_found() -> None:
    """At 95% kept, over the last ten of a thousand levels; over the last hundred few. The exact denoiser makes none."""
    path = VP.linear(0.001, 0.02)
    walk = dense_tail(levels.trailing(path, 60), fine_end(path))
    assert len(fine_end(path)) == FINE + 1
    steps = list(toy(0.1, walk))
    off = (steps[-1].x.flatten()[:, None] - MODES).abs().min(1).values > 4 * SPREAD
    assert 20 < int(off.sum()) < 200
    found = {window: keep(scores(steps, float(path.level(window).u)), 0.95) for window in (9, 99)}
    removed = {window: float((~kept[off]).double().mean()) for window, kept in found.items()}
    assert removed[9] > 0.9
    assert removed[99] < 0.5
    exact = list(toy(0.0, walk))[-1].x.flatten()
    assert bool(((exact[:, None] - MODES).abs().min(1).values < 5 * SPREAD).all())
