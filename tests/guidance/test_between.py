"""Between: the rule inside its half-open interval of u, the positive branch bit for bit outside, and alone there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, VP, Between, Flow, Level, Rescale, UsageError, guided, levels
from ldm_pipe.model import Branches

NESTED = Between(0.2, 0.9, Rescale(0.7, CFG(5)))


@pytest.mark.parametrize(
    ("lo", "hi", "u", "inside"),
    [
        (0.25, 0.75, 0.25, True),
        (0.25, 0.75, 0.5, True),
        (0.25, 0.75, 0.75, False),
        (0.25, 0.75, 0.125, False),
        (0.0, 1.0, 1.0, True),
        (0.0, 0.5, 0.0, True),
        (0.5, 0.5, 0.5, False),
        (0.25, 0.75, 1.0, False),
    ],
)
def test_the_interval_is_half_open_but_for_one(lo: float, hi: float, u: float, inside: bool) -> None:
    for scale in (1.0, 2.0):
        level = Level(scale * (1 - u), scale * u)
        rule = Between(lo, hi, CFG(5))
        assert rule.inside(level) is inside
        assert rule.needs(level) == (("cond", "uncond") if inside else ("cond",))


def test_an_empty_interval_is_the_positive_branch_bit_for_bit(run: Branches, x: Tensor) -> None:
    for level in levels.linspace(Flow(), 9)[1:-1]:
        found = guided(run, Between(0.5, 0.5, CFG(5)))(x, level)
        alone = run(x, level, ("cond",))["cond"]
        assert torch.equal(found.x0, alone.x0)
        assert torch.equal(found.noise, alone.noise)
    assert set(run.evaluations) == {"cond"}


def test_a_full_interval_is_the_rule_bit_for_bit(run: Branches, x: Tensor) -> None:
    for level in levels.linspace(Flow(), 9)[:-1]:
        a, b = (guided(run, rule)(x, level) for rule in (Between(0.0, 1.0, CFG(5)), CFG(5)))
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.noise, b.noise)


@pytest.mark.parametrize("path", [Flow(), VP.linear()])
def test_nested_rules_evaluate_the_other_branch_only_inside(run: Branches, x: Tensor, path: Flow | VP) -> None:
    walk = levels.linspace(path, 40)[:-1]
    inside = sum(0.2 <= lv.u < 0.9 for lv in walk)
    assert 0 < inside < len(walk)
    denoise = guided(run, NESTED)
    for level in walk:
        before = dict(run.evaluations)
        found = denoise(x, level)
        rule = Rescale(0.7, CFG(5)) if 0.2 <= level.u < 0.9 else CFG(1)
        assert torch.equal(found.x0, rule(run(x, level, rule.needs(level)), x, level).x0)
        run.evaluations.clear()
        run.evaluations.update(before)
        run.evaluations.update(dict.fromkeys(NESTED.needs(level), 3))
    assert run.model.evaluations["uncond"] == 2 * 3 * inside


def test_evaluations_of_a_nested_run(run: Branches, x: Tensor) -> None:
    walk = levels.linspace(Flow(), 20)[:-1]
    denoise = guided(run, NESTED)
    for level in walk:
        denoise(x, level)
    assert run.evaluations == {"cond": 3 * 20, "uncond": 3 * sum(0.2 <= lv.u < 0.9 for lv in walk)}


def test_the_positive_branch_can_be_named(run: Branches, x: Tensor) -> None:
    level = Level(0.9, 0.1)
    found = guided(run, Between(0.2, 0.9, CFG(5), positive="uncond"))(x, level)
    assert torch.equal(found.x0, run(x, level, ("uncond",))["uncond"].x0)


@pytest.mark.parametrize(("lo", "hi"), [(-0.1, 0.5), (0.6, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_intervals_outside_0_to_1_are_refused(lo: float, hi: float) -> None:
    with pytest.raises(UsageError, match="between: it takes 0 <= lo <= hi <= 1"):
        Between(lo, hi)
