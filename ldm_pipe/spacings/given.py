"""A walk over levels that somebody chose one by one: a published table, or what `analysis.search` found."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.levels import at_ratios, at_times, checked

SLACK = 1.01  # published tables are rounded


def given(
    path: Path,
    steps: int,
    values: tuple[float, ...] | str = (),
    unit: Literal["sigma", "time", "u"] = "sigma",
) -> list[Level]:
    """Exactly the levels that are given, one a step: --set spacing.file=NAME reads them from a text or JSON file.

    values: falling, the last one before clean (a 0 after it may stand there); as text, numbers with blanks or commas between.
    unit: "sigma" is sigma / alpha, "time" the network's own, "u" is sigma / (alpha + sigma). Raises UsageError where they do
    not fall, leave the path, or are not as many as `steps`.
    """
    count = checked(steps)
    numbers = _numbers(values)
    numbers = numbers[:-1] if numbers[-1:] == [0.0] and unit != "time" else numbers
    if not numbers:
        raise UsageError("spacing file needs levels: --set spacing.file=NAME, or spacing.values with numbers")
    if len(numbers) != count:
        raise UsageError(f"steps is {steps}; the levels given make {len(numbers)} step(s)")
    for k, (a, b) in enumerate(pairwise(numbers), 2):
        if not a > b:
            raise UsageError(f"spacing file: level {k} ({b:g}) is not below the one before it ({a:g})")
    return _times(path, numbers) if unit == "time" else _ratios(path, numbers, unit)


def _numbers(values: tuple[float, ...] | str) -> list[float]:
    try:
        return [float(v) for v in (values.replace(",", " ").split() if isinstance(values, str) else values)]
    except ValueError as error:
        raise UsageError("spacing file: values takes numbers with blanks or commas between") from error


def _times(path: Path, times: list[float]) -> list[Level]:
    if not (path.first <= times[-1] and times[0] <= path.last):
        raise UsageError(f"spacing file: times are {path.first:g} to {path.last:g}, got {times[-1]:g} to {times[0]:g}")
    if path.discrete and any(t != round(t) for t in times):
        raise UsageError("spacing file: this model's times are whole numbers")
    return at_times(path, times)


def _ratios(path: Path, numbers: list[float], unit: str) -> list[Level]:
    low, high = path.level(path.first).ratio, path.level(path.last).ratio
    if unit == "u" and not numbers[0] <= 1:
        raise UsageError(f"spacing file: u is 0 to 1, got {numbers[0]:g}")
    ratios = [Level(1 - v, v).ratio for v in numbers] if unit == "u" else numbers
    if not (ratios[-1] * SLACK >= low and ratios[0] <= high * SLACK):
        raise UsageError(f"spacing file: this model knows sigma / alpha of {low:.4g} to {high:.4g}; the levels leave that")
    if unit == "u":
        return at_times(path, [float(path.time(Level(1 - v, v))) for v in numbers])
    return at_ratios(path, ratios)
