"""Spacings: diffusers' lists of timesteps and sigmas, the papers' formulas, and what holds for every one of them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from ldm_pipe import CLEAN, EDM, VP, Flow, Level, UsageError, build, levels, registry

TABLE = VP.scaled_linear()
PATHS: dict[str, Any] = {
    "table": TABLE,
    "zero terminal": TABLE.zero_terminal(),
    "short table": VP.cosine(20),
    "flow": Flow(),
    "flow of unit clock": Flow(scale=1.0),
    "edm": EDM(),
}


def times(path: Any, walk: list[Level]) -> list[float]:
    return [float(path.time(lv)) for lv in walk[:-1]]


COUNTS = [*range(1, 105), 250, 333, 500, 999, 1000]


@pytest.mark.parametrize("offset", [0, 1])
def test_leading_equals_diffusers_at_every_count(offset: int) -> None:
    made = DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
    for steps in COUNTS[:-1]:
        made.set_timesteps(steps)
        assert times(TABLE, levels.leading(TABLE, steps, offset)) == made.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_timesteps_are_exact_fractions_rounded_and_equal_diffusers_but_for_ties(spacing: str) -> None:
    """numpy's steps of 1000 / n break some ties to the wrong side, and add a time of -1 to some walks (61 have 62)."""
    made = DDIMScheduler(timestep_spacing=spacing)
    for steps in COUNTS[1:]:
        if spacing == "trailing":
            exact = [Fraction(1000) - Fraction(1000 * i, steps) for i in range(steps)]
        else:
            exact = [Fraction(999) - Fraction(999 * i, steps - 1) for i in range(steps)]
        shift = 1 if spacing == "trailing" else 0
        ours = times(TABLE, getattr(levels, spacing)(TABLE, steps))
        assert ours == [round(t) - shift for t in exact], steps
        made.set_timesteps(steps)
        pairs = zip(ours, made.timesteps.tolist()[:steps], exact, strict=True)
        assert all(a == b or (t % 1 == Fraction(1, 2) and abs(a - b) == 1) for a, b, t in pairs), steps


def test_one_step_begins_at_the_end_of_the_path() -> None:
    """Not at time 0, where numpy's linspace of one point lies and nothing would be denoised."""
    assert times(TABLE, levels.linspace(TABLE, 1)) == times(TABLE, levels.trailing(TABLE, 1)) == [999]
    assert times(TABLE, levels.karras(TABLE, 1)) == [999]


def test_all_thousand_steps() -> None:
    for spacing in (levels.trailing, levels.linspace):
        assert times(TABLE, spacing(TABLE, 1000)) == [*range(999, -1, -1)]
    assert times(TABLE, levels.leading(TABLE, 1000, 0)) == [*range(999, -1, -1)]
    assert times(TABLE, levels.leading(TABLE, 1000)) == [*range(999, 0, -1)]  # 1000 is no time: 999, once


@pytest.mark.parametrize("steps", [2, 10, 31])
def test_karras_equals_diffusers(steps: int) -> None:
    made = EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    made.set_timesteps(steps)
    walk = levels.karras(TABLE, steps)
    assert [lv.ratio for lv in walk] == pytest.approx(made.sigmas.tolist(), rel=1e-4)
    assert times(TABLE, walk) == pytest.approx(made.timesteps.tolist(), abs=1e-2)


def test_karras_is_the_formula_of_the_paper() -> None:
    """Karras et al. 2022, eq. 5: sigma_i = (max^(1/7) + i / (n - 1) (min^(1/7) - max^(1/7)))^7 from .002 to 80."""
    n, low, high = 9, 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = [(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)]
    assert [lv.ratio for lv in levels.karras(EDM(), n)] == pytest.approx([*expected, 0])
    given = levels.karras(TABLE, 5, rho=1.0, sigma_min=1.0, sigma_max=5.0)
    assert [lv.ratio for lv in given] == pytest.approx([5, 4, 3, 2, 1, 0])


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_flow_shift_equals_diffusers(shift: float, steps: int) -> None:
    """Esser et al. 2024, eq. 23, of the even times given. (From a count alone diffusers shifts its last time twice.)"""
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    for base, even in (("linspace", np.linspace(1, 1 / 1000, steps)), ("trailing", np.linspace(1, 1 / steps, steps))):
        made.set_timesteps(sigmas=even)
        walk = levels.flow(Flow(), steps, shift, base)
        assert [lv.u for lv in walk] == pytest.approx(made.sigmas.tolist(), abs=1e-6)
    made = FlowMatchEulerDiscreteScheduler()
    made.set_timesteps(steps)
    assert [lv.u for lv in levels.linspace(Flow(), steps)] == pytest.approx(made.sigmas.tolist(), abs=1e-6)


def test_flux_shift_is_an_exponent() -> None:
    mu, steps = 0.9, 12
    made = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    walk = levels.flow(Flow(), steps, math.exp(mu), "trailing")
    assert [lv.u for lv in walk] == pytest.approx(made.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("path", [VP.linear(), Flow(), Flow(scale=1.0)])
def test_flow_multiplies_the_ratio_within_the_path(path: Any) -> None:
    plain, shifted = levels.linspace(path, 30), levels.flow(path, 30, 2.0)
    most = path.level(path.last).ratio
    expected = dict.fromkeys(min(2 * lv.ratio, most) for lv in plain[:-1])
    assert [lv.ratio for lv in shifted[:-1]] == pytest.approx(list(expected), rel=1e-9)


@pytest.mark.parametrize("steps", [2, 7, 16, 76, 100])
def test_quadratic_equals_the_official_code(steps: int) -> None:
    """Song et al. 2020: seq = np.linspace(0, sqrt(T * 0.8), S) ** 2, each cut to a whole number."""
    seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    exact = [800 * i * i // (steps - 1) ** 2 for i in range(steps)]  # where it is whole, theirs may fall below it
    for i, (a, b) in enumerate(zip(exact, seq, strict=True)):
        assert a == b or (a == b + 1 and 800 * i * i % (steps - 1) ** 2 == 0)
    assert times(TABLE, levels.quadratic(TABLE, steps)) == list(dict.fromkeys(reversed(exact)))


def test_a_flow_walk_does_not_depend_on_the_clock() -> None:
    for name in ("leading", "trailing", "linspace", "quadratic", "karras", "flow"):
        more = {"sigma_max": 50.0} if name == "karras" else {}
        a, b = (build("spacing", name, **more)(Flow(scale=s), 7) for s in (1000.0, 0.7))
        assert [lv.u for lv in a] == pytest.approx([lv.u for lv in b], abs=1e-12), name


@pytest.mark.parametrize("name", registry.KINDS["spacing"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 300])
def test_every_spacing_falls_within_the_path_to_clean(name: str, path: Any, steps: int) -> None:
    """At most steps + 1 levels, strictly falling, the last one clean, the rest in the path's range and coordinates."""
    walk, refusal = [], ""
    try:
        walk = build("spacing", name)(path, steps)
    except UsageError as error:
        refusal = str(error)
    if not walk:
        known = any(w in refusal for w in ("sigma_max", "no table of times", "needs levels"))
        assert known or (steps == 300 and path is PATHS["short table"] and "takes 1 to 20" in refusal)
        return
    us = [lv.u for lv in walk]
    assert all(isinstance(lv, Level) for lv in walk)
    assert 2 <= len(walk) <= steps + 1
    assert walk[-1] == CLEAN
    assert all(a > b for a, b in pairwise(us))
    if name == "zero_terminal":  # it leaves the table on purpose
        return
    if path is not PATHS["edm"] or name not in ("flow", "token_shift"):  # its clock has no end
        assert us[0] <= path.level(path.last).u + 1e-12
    assert all(lv == pytest.approx(path.level(float(path.time(lv))), abs=1e-9) for lv in walk[:-1])
    if path.discrete and name in ("leading", "trailing", "linspace", "quadratic", "beta"):
        assert all(t == round(t) and 0 <= t <= path.last for t in times(path, walk))


OTHER_ENDS = ("leading", "quadratic", "file", "zero_terminal", "align_your_steps")


@pytest.mark.parametrize("name", [n for n in registry.KINDS["spacing"] if n not in OTHER_ENDS])
def test_spacings_of_both_ends_begin_with_all_the_noise_there_is(name: str) -> None:
    for path in (TABLE, VP.linear()):
        assert build("spacing", name)(path, 9)[0] == pytest.approx(path.level(path.last))


@pytest.mark.parametrize("steps", [0, -1, 10_001])
@pytest.mark.parametrize("name", registry.KINDS["spacing"])
def test_counts_out_of_range_are_refused(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=f"steps is {steps}"):
        build("spacing", name)(TABLE, steps)


@pytest.mark.parametrize("name", ["leading", "trailing", "quadratic"])
def test_edm_has_no_table(name: str) -> None:
    with pytest.raises(UsageError, match="EDM has no table of times; use karras or linspace"):
        build("spacing", name)(EDM(), 5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("karras", {"sigma_min": 0.0}, "sigma_min"),
        ("karras", {"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min"),
        ("karras", {"sigma_max": math.inf}, "sigma_max"),
        ("karras", {"rho": 0.0}, "rho"),
        ("flow", {"shift": 0.0}, "shift"),
        ("flow", {"shift": math.nan}, "shift"),
        ("flow", {"shift": math.inf}, "shift"),
        ("flow", {"base": "leading"}, "linspace, trailing"),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("spacing", name, **fields)(TABLE, 5)


def test_karras_from_pure_noise_asks_for_an_end() -> None:
    with pytest.raises(UsageError, match="ends in alpha = 0, give sigma_max"):
        levels.karras(Flow(), 5)
    assert levels.karras(Flow(), 5, sigma_max=10.0)[0].ratio == pytest.approx(10)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.5, 5), (0.31, 3), (0.01, 1)])
def test_tail_keeps_the_end_of_the_walk(strength: float, steps: int) -> None:
    walk = levels.trailing(TABLE, 10)
    assert levels.tail(walk, strength) == walk[-steps - 1 :]


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_strength_is_above_0_and_at_most_1(strength: float) -> None:
    with pytest.raises(UsageError, match="strength is"):
        levels.tail(levels.trailing(TABLE, 10), strength)
