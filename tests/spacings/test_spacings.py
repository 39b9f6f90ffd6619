"""The spacings with papers: diffusers' sigmas where it is right, the papers' numbers, scipy's quantiles, untrusted files."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from scipy.stats import beta as beta_of_scipy

from ldm_pipe import CLEAN, EDM, EPS, VELOCITY, VP, Cond, Flow, Gaussian, Level, Model, UsageError, build, levels
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.level_file import filled_in, read
from ldm_pipe.spacings.beta import quantile

TABLE = VP.scaled_linear()
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def times(path: Any, walk: list[Level]) -> list[float]:
    return [float(path.time(lv)) for lv in walk[:-1]]


@pytest.mark.parametrize("steps", [2, 9, 30])
@pytest.mark.parametrize("name", ["exponential", "lambda"])
def test_exponential_and_lambda_equal_diffusers(name: str, steps: int) -> None:
    """Its `use_exponential_sigmas` and its `use_lu_lambdas` are one spacing, and so are ours."""
    walk = build("spacing", name)(TABLE, steps)
    euler = EulerDiscreteScheduler(use_exponential_sigmas=True, **STABLE)
    solver = DPMSolverMultistepScheduler(use_lu_lambdas=True, final_sigmas_type="zero", **STABLE)
    euler.set_timesteps(steps)
    solver.set_timesteps(steps)
    for made in (euler, solver):
        assert [lv.ratio for lv in walk] == pytest.approx(made.sigmas.tolist(), rel=2e-4)


def test_lambda_has_even_steps_between_given_ends() -> None:
    walk = build("spacing", "lambda", sigma_min=0.1, sigma_max=10.0)(Flow(), 6)
    assert [b.log_snr - a.log_snr for a, b in pairwise(walk[:-1])] == pytest.approx([2 * math.log(100) / 5] * 5)
    assert (walk[0].ratio, walk[-2].ratio) == pytest.approx((10, 0.1))
    with pytest.raises(UsageError, match=r"exponential needs .*this path ends in alpha = 0, give sigma_max"):
        build("spacing", "lambda")(Flow(), 6)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (0.05, 0.3), (5.0, 2.0), (0.5, 10.0), (10.0, 10.0)])
def test_quantiles_of_beta_equal_scipys(a: float, b: float) -> None:
    parts = [0.0, 1e-6, 0.03, 0.2, 0.5, 0.77, 0.999, 1.0]
    assert [quantile(p, a, b) for p in parts] == pytest.approx(beta_of_scipy.ppf(parts, a, b).tolist(), rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_beta_takes_the_quantiles_of_time(steps: int) -> None:
    parts = 1 - np.linspace(0, 1, steps, endpoint=False)
    expected = np.rint(beta_of_scipy.ppf(parts, 0.6, 0.6) * 999)
    assert times(TABLE, build("spacing", "beta")(TABLE, steps)) == list(dict.fromkeys(expected.tolist()))
    flow = build("spacing", "beta", alpha=2.0, beta=0.7)(Flow(), steps)
    assert [lv.u for lv in flow[:-1]] == pytest.approx((0.001 + 0.999 * beta_of_scipy.ppf(parts, 2.0, 0.7)).tolist())


def test_beta_is_denser_at_both_ends_and_even_for_one_and_one() -> None:
    gaps = [a - b for a, b in pairwise(times(TABLE, build("spacing", "beta")(TABLE, 20)))]
    assert gaps[0] < gaps[9] / 3
    assert gaps[-1] < gaps[9]
    even = times(TABLE, build("spacing", "beta", alpha=1.0, beta=1.0)(TABLE, 10))
    assert even == pytest.approx([999 - 99.9 * i for i in range(10)], abs=0.51)


@pytest.mark.parametrize(
    ("model", "theirs"), [("sd", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("svd", "StableDiffusionVideo")]
)
def test_align_your_steps_has_the_published_numbers(model: str, theirs: str) -> None:
    sigmas = AysSchedules[f"{theirs}Sigmas"]
    path = TABLE if model != "svd" else EDM(sigma_max=700.0)
    walk = build("spacing", "align_your_steps", model=model)(path, 10)
    assert [lv.ratio for lv in walk] == pytest.approx(sigmas, rel=1e-4)
    if model != "svd":  # the times they publish beside them, the nearest whole ones
        assert times(path, walk) == pytest.approx(AysSchedules[f"{theirs}Timesteps"], abs=4)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 35])
def test_align_your_steps_interpolates_logarithms(steps: int) -> None:
    """The authors' loglinear_interp over steps + 1 places, the last of them left out."""
    table = [*AysSchedules["StableDiffusionSigmas"][:-1], 0.029]
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(table)))[:-1]
    assert [lv.ratio for lv in build("spacing", "align_your_steps")(EDM(), steps)[:-1]] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (1024, 0.63), (4096, 1.15), (2176, 0.825)])
def test_token_shift_is_fluxs(tokens: int, mu: float) -> None:
    made = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=mu)
    walk = build("spacing", "token_shift", tokens=tokens)(Flow(), 12)
    assert [lv.u for lv in walk] == pytest.approx(made.sigmas.tolist(), abs=1e-6)


def test_token_shift_by_the_root_is_eq_23() -> None:
    plain, walk = levels.trailing(Flow(), 8), build("spacing", "token_shift", tokens=4096, rule="root")(Flow(), 8)
    assert [lv.ratio for lv in walk[1:-1]] == pytest.approx([4 * lv.ratio for lv in plain[1:-1]])
    assert build("spacing", "token_shift", tokens=256, rule="root")(Flow(), 8) == plain


def test_zero_terminal_is_trailing_over_the_rescaled_table() -> None:
    for steps in (1, 4, 25):
        ours, theirs = build("spacing", "zero_terminal")(TABLE, steps), levels.trailing(TABLE.zero_terminal(), steps)
        assert ours[0] == (0.0, 1.0)
        assert np.array(ours) == pytest.approx(np.array(theirs), abs=1e-9)
        assert build("spacing", "zero_terminal")(Flow(), steps) == levels.trailing(Flow(), steps)


def test_zero_terminal_lets_a_network_of_v_start_at_pure_noise() -> None:
    """At the clamped time of its table; a network of noise refuses by name."""
    prior = Gaussian.isotropic(torch.zeros(4, dtype=torch.float64), 0.7)
    x, first = torch.ones(1, 1, 2, 2, dtype=torch.float64), build("spacing", "zero_terminal")(TABLE, 5)[0]
    assert torch.isfinite(Model(ExactNetwork((prior,), TABLE, VELOCITY), TABLE, VELOCITY).bind(Cond())(x, first).x0).all()
    with pytest.raises(UsageError, match="alpha = 0"):
        Model(ExactNetwork((prior,), TABLE, EPS), TABLE, EPS).bind(Cond())(x, first)


@pytest.mark.parametrize(
    ("text", "values", "unit"),
    [
        ("14.6, 3.9\n0.4 # the last\n", (14.6, 3.9, 0.4), "sigma"),
        ("time: 999 500 1", (999, 500, 1), "time"),
        ("# ours\nu:\n0.9,0.5", (0.9, 0.5), "u"),
        ("[3, 2, 1]", (3, 2, 1), "sigma"),
        ('{"time": [999, 20]}', (999, 20), "time"),
        ("\ufeff[3]", (3,), "sigma"),
        ("", (), "sigma"),
    ],
)
def test_levels_are_read_from_text_and_json(tmp_path: Path, text: str, values: tuple[float, ...], unit: str) -> None:
    file = tmp_path / "levels"
    file.write_text(text, encoding="utf-8")
    assert read(file) == {"values": values, "unit": unit}
    assert filled_in({"file": str(file), "x": 1}) == {"x": 1, "values": values, "unit": unit}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"3 two 1", "number 2 is not a finite number"),
        (b"nan", "number 1 is not a finite number"),
        (b"[3, true]", "number 2 is not a finite number"),
        (b"[3, 1e999]", "number 2 is not a finite number"),
        (b'[3, "1", [2]]', "number 3 is not a finite number"),
        (b"[3,", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"times": [3]}', "did you mean 'time'"),
        (b'{"time": [3], "u": [1]}', "holds 2 lists"),
        (b"hours: 3 2", "'hours' is not a name of a unit"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (b"1 " * 600_000, "is larger than 1 MB"),
        (b"1 " * 20_000, "holds more than 10001 numbers"),
    ],
)
def test_a_file_that_is_no_list_is_refused_by_its_place(tmp_path: Path, data: bytes, says: str) -> None:
    file = tmp_path / "levels"
    file.write_bytes(data)
    with pytest.raises(UsageError, match=says):
        read(file)
    with pytest.raises(UsageError, match="is not a file"):
        read(tmp_path)


def test_given_levels_are_walked_as_they_stand(tmp_path: Path) -> None:
    walk = build("spacing", "file", values="14.6 3, 0.5 0", unit="sigma")(TABLE, 3)
    assert [lv.ratio for lv in walk] == pytest.approx([14.6, 3, 0.5, 0])
    assert times(TABLE, build("spacing", "file", values=(999, 3, 0), unit="time")(TABLE, 3)) == [999, 3, 0]
    assert [lv.u for lv in build("spacing", "file", values=[1, 0.25], unit="u")(Flow(), 2)] == [1, 0.25, 0]
    table = tmp_path / "sd.json"
    table.write_text(json.dumps(AysSchedules["StableDiffusionSigmas"]))
    same = build("spacing", "align_your_steps")(TABLE, 10)
    assert build("spacing", "file", **read(table))(TABLE, 10) == same


@pytest.mark.parametrize(
    ("fields", "steps", "says"),
    [
        ({}, 3, "needs levels"),
        ({"values": "3 2"}, 3, "steps is 3; the levels given make 2 step"),
        ({"values": "3 3"}, 2, r"level 2 \(3\) is not below the one before it \(3\)"),
        ({"values": "3 x"}, 2, "takes numbers"),
        ({"values": "20 3"}, 2, "of 0.02917 to 14.61; the levels leave that"),
        ({"values": "3 -1"}, 2, "the levels leave that"),
        ({"values": "1.2 0.3", "unit": "u"}, 2, "u is 0 to 1"),
        ({"values": "1000 3", "unit": "time"}, 2, "times are 0 to 999"),
        ({"values": "900 3.5", "unit": "time"}, 2, "whole numbers"),
        ({"values": "3", "unit": "hours"}, 1, "choose from sigma, time, u"),
    ],
)
def test_levels_that_make_no_walk_are_refused(fields: dict[str, Any], steps: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build("spacing", "file", **fields)(TABLE, steps)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("beta", {"alpha": 0.0}),
        ("beta", {"beta": 11.0}),
        ("token_shift", {"tokens": 0}),
        ("token_shift", {"max_shift": 1e6}),
        ("exponential", {"sigma_min": 3.0, "sigma_max": 2.0}),
    ],
)
def test_fields_out_of_range_are_refused(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{name}.*(take|needs)"):
        build("spacing", name, **fields)(TABLE, 5)


def test_the_times_of_distillation_equal_diffusers() -> None:
    """LCM's and TCD's, for every count and two tables of distillation; more steps than were trained are those that were."""
    from diffusers import LCMScheduler, TCDScheduler

    for train in (50, 40):
        for made in (LCMScheduler(original_inference_steps=train), TCDScheduler(original_inference_steps=train)):
            for steps in range(1, train + 1):
                made.set_timesteps(steps)
                assert times(TABLE, build("spacing", "lcm", train=train)(TABLE, steps)) == made.timesteps.tolist()
    assert build("spacing", "lcm")(TABLE, 300) == build("spacing", "lcm")(TABLE, 50)
    with pytest.raises(UsageError, match="train is 0"):
        build("spacing", "lcm", train=0)(TABLE, 4)


def test_every_list_ends_clean() -> None:
    for name in ("lcm", "exponential", "beta", "align_your_steps", "token_shift", "zero_terminal"):
        assert build("spacing", name)(TABLE, 6)[-1] == CLEAN
