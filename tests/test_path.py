"""Paths: the same place on each, clocks and levels inverse, the tables and preconditionings of the papers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ldm_pipe import CLEAN, EDM, VP, Flow, Level, UsageError

PATHS: dict[str, Any] = {
    "linear": VP.linear(),
    "scaled_linear": VP.scaled_linear(),
    "cosine": VP.cosine(),
    "zero terminal": VP.scaled_linear().zero_terminal(),
    "flow": Flow(),
    "flow of unit clock": Flow(scale=1.0),
    "edm": EDM(),
}
every = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@every
def test_time_and_level_are_inverse(path: Any) -> None:
    for part in (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.999, 0.9999, 1.0):
        time = path.first + part * (path.last - path.first)
        level = path.level(time)
        assert float(path.time(level)) == pytest.approx(time, abs=1e-9 * max(1, abs(path.last)))
        _, own = path.rescale(level)
        assert float(path.time(own)) == pytest.approx(time, abs=1e-6) or path.data_std != 1


@every
def test_noise_rises_with_time(path: Any) -> None:
    count = 2 * round(abs(path.last) if path.discrete else 50)
    us = [path.level(path.first + (path.last - path.first) * i / count).u for i in range(count + 1)]
    assert all(a < b for a, b in pairwise(us))


@every
def test_rescaling_keeps_the_place_and_the_image(path: Any) -> None:
    """c * (alpha x0 + sigma noise) = own.alpha (x0 / data_std) + own.sigma noise, for levels of any other path."""
    for level in (Level(0.3, 0.9), Level(1.0, 5.0), Level(0.0, 2.0), Level(3.0, 0.0), Level(0.25, 0.75)):
        c, own = path.rescale(level)
        assert own.alpha == pytest.approx(c * level.alpha * path.data_std)
        assert own.sigma == pytest.approx(c * level.sigma)
        circle = own.alpha + own.sigma if isinstance(path, Flow) else math.hypot(*own)
        assert circle == pytest.approx(1)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero", [False, True])
def test_tables_equal_diffusers(kind: str, zero: bool) -> None:
    ends = {"beta_start": 0.00085, "beta_end": 0.012} if kind == "scaled_linear" else {}
    theirs = DDIMScheduler(beta_schedule=kind, rescale_betas_zero_snr=zero, **ends).alphas_cumprod.double()
    path = {"linear": VP.linear, "scaled_linear": VP.scaled_linear, "squaredcos_cap_v2": VP.cosine}[kind]()
    ours = (path.zero_terminal() if zero else path).table
    assert list(ours) == pytest.approx(theirs.tolist(), rel=2e-4, abs=1e-6)


def test_the_tables_of_the_papers() -> None:
    """Ho et al. 2020, section 4; Rombach et al. 2022; Nichol and Dhariwal 2021, eq. 17, whose middle is near 1/2."""
    betas = [1 - b / a for a, b in zip((1.0, *VP.linear().table), VP.linear().table, strict=False)]
    assert (betas[0], betas[500], betas[-1]) == pytest.approx((1e-4, 1e-4 + 0.0199 * 500 / 999, 0.02))
    betas = [1 - b / a for a, b in zip((1.0, *VP.scaled_linear().table), VP.scaled_linear().table, strict=False)]
    middle = (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * 500 / 999) ** 2
    assert (betas[0], betas[500], betas[-1]) == pytest.approx((0.00085, middle, 0.012))
    assert VP.cosine().table[499] == pytest.approx(0.5, abs=0.01)
    assert 1 - VP.cosine().table[-1] / VP.cosine().table[-2] == pytest.approx(0.999)


@pytest.mark.parametrize("path", [VP.linear(), VP.scaled_linear(), VP.cosine(100)])
def test_zero_terminal_keeps_the_first_step_and_ends_in_pure_noise(path: VP) -> None:
    """Lin et al. 2023, algorithm 1: sqrt(abar) shifted and scaled, so its steps keep their proportions."""
    zero = path.zero_terminal()
    assert zero.table[-1] == 0
    assert zero.level(zero.last) == (0.0, 1.0)
    assert zero.table[0] == pytest.approx(path.table[0], rel=1e-12)
    before, after = ([math.sqrt(a) for a in p.table] for p in (path, zero))
    scale = (after[3] - after[2]) / (before[3] - before[2])
    assert scale == pytest.approx((after[-1] - after[-5]) / (before[-1] - before[-5]))


def test_table_levels_lie_on_the_circle_and_between_entries_log_ratios_are_linear() -> None:
    path = VP.linear()
    assert path.level(250) == (math.sqrt(path.table[250]), math.sqrt(1 - path.table[250]))
    low, middle, high = (path.level(t) for t in (250, 250.25, 251))
    assert math.hypot(*middle) == pytest.approx(1)
    assert middle.log_snr == pytest.approx(0.75 * low.log_snr + 0.25 * high.log_snr)


@pytest.mark.parametrize("path", [VP.linear(), VP.linear().zero_terminal()])
def test_a_table_clamps_its_clock(path: VP) -> None:
    assert path.time(CLEAN) == 0
    assert path.time(Level(0.0, 1.0)) == 999
    assert VP((0.5,)).time(Level(0.9, 0.1)) == VP((0.5,)).time(Level(0.1, 0.9)) == 0


@pytest.mark.parametrize("table", [(), (0.5, 0.5), (0.5, 0.6), (1.2, 0.5), (0.5, -0.1), (1.0, 0.5), (0.9, float("nan"), 0.5)])
def test_tables_that_do_not_fall_within_1_and_0_are_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match=r"strictly within 1\.\.0"):
        VP(table)


def test_the_flow_clock() -> None:
    assert Flow().level(250.0) == (0.75, 0.25)
    assert Flow().time(Level(3.0, 1.0)) == 250
    assert Flow(scale=1.0).time(Level(0.0, 4.0)) == 1
    assert (Flow().first, Flow().last) == (1, 1000)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 7.0, 80.0])
def test_edm_gives_the_preconditioning_of_the_paper(sigma: float) -> None:
    """Karras et al. 2022, table 1: c_in, c_skip, c_out and c_noise of x0 + sigma noise, through our v prediction."""
    path, s = EDM(data_std=0.5), 0.5
    level = Level(1.0, sigma)
    c, own = path.rescale(level)
    assert c == pytest.approx(1 / math.hypot(sigma, s))
    assert path.time(level) == pytest.approx(math.log(sigma) / 4)
    assert s * own.alpha * c == pytest.approx(s**2 / (sigma**2 + s**2))  # c_skip: D = s (alpha c x - sigma v)
    assert s * own.sigma == pytest.approx(sigma * s / math.hypot(sigma, s))  # c_out, of F = -v
    assert path.level(path.first).sigma == pytest.approx(0.002)
    assert path.level(path.last).sigma == pytest.approx(80.0)


@pytest.mark.parametrize("level", [Level(0.0, 1.0), CLEAN])
def test_edm_has_no_time_at_either_end(level: Level) -> None:
    with pytest.raises(UsageError, match="EDM network has no time"):
        EDM().time(level)


@every
def test_training_levels_are_tensors(path: Any) -> None:
    """[B,1,1,1] tensors in place of floats: the same clock and the same rescaling, row by row."""
    rows = [path.level(path.first + part * (path.last - path.first)) for part in (0.1, 0.5, 0.9)]
    batch = Level(*(torch.tensor(v, dtype=torch.float64)[:, None, None, None] for v in zip(*rows, strict=True)))
    times = torch.as_tensor(path.time(batch)).flatten().tolist()
    assert times == pytest.approx([float(path.time(row)) for row in rows])
    c, own = path.rescale(batch)
    expected = [(a, *b) for a, b in map(path.rescale, rows)]
    assert torch.cat([c, *own], dim=1)[:, :, 0, 0].tolist() == [pytest.approx(row) for row in expected]
    assert batch.u.flatten().tolist() == pytest.approx([row.u for row in rows])  # type: ignore[union-attr]
