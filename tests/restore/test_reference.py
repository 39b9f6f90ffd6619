"""The published samplers' known biases on the reference problem: W2 to the posterior / error of the mean / ratio of traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Level, sample
from ldm_pipe.analysis import Closeness, closeness
from ldm_pipe.levels import jumps
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.adir import ADIR
from ldm_pipe.restore.ddnm import DDNM
from ldm_pipe.restore.ddnm_plus import DDNMPlus
from ldm_pipe.restore.ddrm import DDRM
from ldm_pipe.restore.diffpir import DiffPIR
from ldm_pipe.restore.dmps import DMPS
from ldm_pipe.restore.dps import DPS, DPSScore
from ldm_pipe.restore.exact import ExactGuidance
from ldm_pipe.restore.ilvr import ILVR
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.restore.repaint import RePaint
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.renoise import Renoise

Make = Callable[[str, float], Any]
Grid = Callable[[int], list[Level]]


def agrees(found: Closeness, printed: str) -> bool:
    """Is this what the values read when printed to as many decimals? (The table was rounded from four decimals to three.)"""
    pairs = zip(found, printed.split("/"), strict=True)
    return all(abs(value - float(text)) <= 0.55 * 10.0 ** -len(text.split(".")[1]) for value, text in pairs)


GUIDES: list[Any] = [
    ("exact", lambda m, c: ExactGuidance(m, c), DDPM(), 1000, 0.1, ".0105/.000/.969", ".0109/.000/.987"),
    ("exact", lambda m, c: ExactGuidance(m, c), DDPM(), 1000, 0.0, ".0075/.000/.974", ".0080/.000/.989"),
    ("exact", lambda m, c: ExactGuidance(m, c), DDPM(), 100, 0.1, ".0713/.000/.794", ".0766/.000/.901"),
    ("exact", lambda m, c: ExactGuidance(m, c), DDPM(), 100, 0.0, ".0549/.000/.816", ".0647/.000/.907"),
    ("dps squared", lambda m, c: DPSScore(m), DDPM(), 1000, 0.1, ".230/.111/.859", "2.087/1.157/.759"),
    ("dmps 1.75", lambda m, c: DMPS(m), DDPM(), 1000, 0.1, ".233/.107/.886", "1.085/.574/1.477"),
    ("dmps 1", lambda m, c: DMPS(m, 1.0), DDPM(), 1000, 0.1, ".301/.155/.987", "1.127/.590/1.572"),
    ("diffpir .1", lambda m, c: DiffPIR(m), Renoise(0.1**0.5), 100, 0.1, ".209/.106/.903", "1.067/.567/1.437"),
    ("diffpir 1", lambda m, c: DiffPIR(m), Renoise(1.0), 100, 0.1, ".223/.031/.436", ".724/.352/.529"),
    ("ddnm", lambda m, c: DDNM(m), Renoise(0.85), 100, 0.0, ".109/.025/.687", ".621/.323/.810"),
]
SAMPLERS: list[Any] = [
    ("ddrm", DDRM, 20, 0.1, ".266/.101/.512", "1.037/.569/.918"),
    ("ddrm", DDRM, 20, 0.0, ".268/.107/.532", "1.095/.577/.920"),
    ("ddrm", DDRM, 100, 0.1, ".162/.036/.625", ".779/.427/.842"),
    ("ddnm+", DDNMPlus, 100, 0.1, ".162/.036/.625", ".779/.427/.842"),
    ("ilvr", lambda m: ILVR(m, DDPM()), 1000, 0.0, ".176/.086/1.003", "1.070/.553/1.396"),
    ("repaint once", lambda m: RePaint(m, DDPM()), 250, 0.0, ".179/.087/.941", "1.071/.555/1.365"),
]


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
@pytest.mark.parametrize("row", GUIDES, ids=lambda r: f"{r[0]}-{r[3]}-{r[4]}")
def test_guides(reference: Make, grid: Grid, row: Any, operator: str) -> None:
    _, guide, kernel, steps, deviation, *printed = row
    problem = reference(operator, deviation)
    denoise = guide(problem.measurement, problem.prior.covariance)(problem.prior)
    found = problem.judge(denoise, kernel, grid(steps))
    assert agrees(found, printed[operator == "mask4"]), found


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
@pytest.mark.parametrize("row", SAMPLERS, ids=lambda r: f"{r[0]}-{r[2]}-{r[3]}")
def test_samplers(reference: Make, grid: Grid, row: Any, operator: str) -> None:
    _, make, steps, deviation, *printed = row
    problem = reference(operator, deviation)
    found = problem.judge(problem.prior, make(problem.measurement), grid(steps))
    assert agrees(found, printed[operator == "mask4"]), found


@pytest.mark.parametrize(("operator", "printed"), [("pool2", ".050/.013/.856"), ("mask4", ".468/.248/.979")])
def test_resampling_ten_times(reference: Make, grid: Grid, operator: str, printed: str) -> None:
    """The walk of 4571 levels. Better than once, and still not the posterior."""
    problem = reference(operator, 0.0)
    found = problem.judge(problem.prior, RePaint(problem.measurement, DDPM()), jumps(grid(250)))
    assert agrees(found, printed), found


@pytest.mark.parametrize(("scale", "operator", "w2"), [(1.0, "pool2", 1.489), (5.0, "pool2", 0.329), (5.0, "mask4", 0.505)])
def test_adir(reference: Make, grid: Grid, scale: float, operator: str, w2: float) -> None:
    problem = reference(operator, 0.1)
    found = problem.judge(problem.prior, ADIR(problem.measurement, scale), grid(1000))
    assert abs(found.w2 - w2) < 0.55e-3


class Torch:
    """A source of many images, faster than a generator for each."""

    def __init__(self, count: int) -> None:
        self.generator, self.shape = torch.Generator().manual_seed(0), (count, 2, 2, 2)

    def at(self, index: int) -> StepNoise:
        return lambda tag="step": torch.randn(self.shape, dtype=torch.float64, generator=self.generator)


@pytest.mark.parametrize(("operator", "w2", "mean", "ratio"), [("pool2", 0.26, 0.11, 0.80), ("mask4", 1.86, 1.03, 0.76)])
def test_the_norm_of_dps_by_monte_carlo(
    reference: Make, grid: Grid, operator: str, w2: float, mean: float, ratio: float
) -> None:
    """Not affine in x, so 1500 images stand for the distribution; within what so many can tell."""
    problem = reference(operator, 0.1)
    source, sampler = Torch(1500), DPS(problem.measurement, DDPM(), 0.3)
    x: Tensor = sample(problem.prior, source.at(0)("start"), grid(1000), sampler, source).reshape(-1, 8)
    found = closeness((x.mean(0), x.T.cov()), (problem.posterior.mean, problem.posterior.covariance))
    assert found == pytest.approx((w2, mean, ratio), rel=0.1)


def test_a_measurement_without_a_spectrum_is_refused_by_name(reference: Make) -> None:
    from ldm_pipe import UsageError
    from ldm_pipe.restore.clip import Clip

    measurement = Measurement(Clip(), torch.zeros(1, *(2, 2, 2)))
    with pytest.raises(UsageError, match="Clip has no singular values, which this method needs; choose"):
        measurement.linear.pinv(measurement.y)
