"""CFG: the paper's line through both branches, exactly the positive branch at scale 1, and one evaluation there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, PREDICTIONS, Estimate, Level, guided
from ldm_pipe.model import Branches

LEVEL = Level(0.4, 0.6)


def test_scale_one_is_the_positive_branch_and_evaluates_nothing_else(run: Branches, x: Tensor) -> None:
    found = guided(run, CFG(1))(x, LEVEL)
    assert run.evaluations == {"cond": 3}
    alone = run(x, LEVEL, ("cond",))["cond"]
    assert torch.equal(found.x0, alone.x0)
    assert torch.equal(found.noise, alone.noise)


def test_scale_one_takes_no_part_of_the_other_branch(estimates: dict[str, Estimate], x: Tensor) -> None:
    assert CFG(1.0)(estimates, x, LEVEL) is estimates["cond"]
    assert CFG(1.0)({"cond": estimates["cond"]}, x, LEVEL) is estimates["cond"]


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 7.5])
def test_is_the_line_through_both_in_every_space(scale: float, estimates: dict[str, Estimate], x: Tensor) -> None:
    """Ho and Salimans 2022, eq. 6 with w = scale - 1: (1 + w) p - w n, in x0, noise, v and flow alike."""
    found = CFG(scale)(estimates, x, LEVEL)
    for prediction in PREDICTIONS.values():
        p, n, g = (prediction.target(e.x0, e.noise, LEVEL) for e in (estimates["cond"], estimates["uncond"], found))
        assert torch.allclose(g, scale * p - (scale - 1) * n)
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), x)
    assert found.log_var is estimates["cond"].log_var


def test_counts_and_names(run: Branches, x: Tensor) -> None:
    guided(run, CFG(2))(x, LEVEL)
    assert run.evaluations == {"cond": 3, "uncond": 3}
    assert CFG(2, "a", "b").needs(LEVEL) == ("a", "b")
    assert CFG(1, "a", "b").needs(LEVEL) == ("a",)


def test_names_choose_who_is_positive(estimates: dict[str, Estimate], x: Tensor) -> None:
    other = CFG(3, positive="uncond", negative="cond")(estimates, x, LEVEL)
    assert torch.allclose(other.x0, estimates["uncond"].x0 + 2 * (estimates["uncond"].x0 - estimates["cond"].x0))
