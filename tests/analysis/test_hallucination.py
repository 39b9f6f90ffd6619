"""The score is the variance of the last estimates; it finds a sample whose estimate wavers and tells when it cannot."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import UsageError
from ldm_pipe.analysis.hallucination import dense_tail, keep, scores
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.walk import Step

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
