"""Spacings: functions from a path and a number of steps to a list of steps + 1 levels, the last one clean.

Spacing is not a sampler's business: any list of levels goes with any sampler. The times they choose are the path's own
(0..T-1 for VP, a thousandth to 1 for Flow); VP times are whole numbers, because only those were trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Path

MOST_STEPS = 10_000


def leading(path: Path, steps: int, offset: int = 1) -> list[Level]:
    """Every (T // steps)-th time from `offset` on: Stable Diffusion's default, whose first level is not all noise.

    Common Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al. 2023, arXiv 2305.08891, table 2.
    """
    span = _span(path, steps)
    jump = span // steps
    if jump < 1:
        raise UsageError(f"steps is {steps}; leading takes 1 to {span}")
    return at_times(path, [_time(path, min(i * jump + offset, span - 1)) for i in reversed(range(steps))])


def trailing(path: Path, steps: int) -> list[Level]:
    """From the very last time down in jumps of T / steps (Lin et al. 2023, table 2): right for few steps and zero SNR."""
    span = _span(path, steps)
    if path.discrete and steps > span:
        raise UsageError(f"steps is {steps}; trailing takes 1 to {span}")
    times = [span - i * span / steps for i in range(steps)]
    return at_times(path, [_time(path, (_nearest(t) if path.discrete else t) - 1) for t in times])


def linspace(path: Path, steps: int) -> list[Level]:
    """Evenly spaced times, both ends included."""
    times = evenly(path.last, path.first, checked(steps))
    return at_times(path, [float(_nearest(t)) for t in times] if path.discrete else times)


def quadratic(path: Path, steps: int, part: float = 0.8) -> list[Level]:
    """Squares of evenly spaced roots up to part * T: DDIM's spacing for CIFAR-10 (Song et al. 2020, arXiv 2010.02502, D.2)."""
    span = _span(path, steps)
    squares = [part * span * i * i / max(1, steps - 1) ** 2 for i in reversed(range(steps))]
    return at_times(path, [_time(path, min(int(t) if path.discrete else t, span - 1)) for t in squares])


def karras(
    path: Path, steps: int, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None
) -> list[Level]:
    """Even steps of (sigma / alpha)^(1 / rho). Karras et al. 2022, arXiv 2206.00364, eq. 5.

    sigma_min, sigma_max: ends of sigma / alpha; by default the path's. Raises UsageError where the path ends in alpha = 0.
    """
    low, high = ends(path, sigma_min, sigma_max, "karras")
    if not 0 < rho < math.inf:
        raise UsageError(f"karras: rho is {rho}; it takes a number above 0")
    roots = evenly(high ** (1 / rho), low ** (1 / rho), checked(steps))
    return at_ratios(path, [r**rho for r in roots])


def flow(path: Path, steps: int, shift: float = 3.0, base: str = "linspace") -> list[Level]:
    """Another spacing with sigma / alpha multiplied by `shift` at every level: u' = k u / (1 + (k - 1) u).

    Scaling Rectified Flow Transformers, Esser et al. 2024, arXiv 2403.03206, eq. 23. shift 1 is the base spacing.
    base: "linspace" (times 1 to a thousandth), "trailing" (Flux), or "shifted" (times 1 to a thousandth that is shifted itself,
    so that the last of them is shifted twice: Stable Diffusion 3 and Sana in diffusers).
    """
    if base not in ("linspace", "trailing", "shifted"):
        raise UsageError(f"flow: base is {base!r}; choose from linspace, trailing, shifted")
    if not 0 < shift < math.inf:
        raise UsageError(f"flow: shift is {shift}; it takes a number above 0")
    plain = trailing(path, steps) if base == "trailing" else linspace(path, steps)
    if shift == 1:
        return plain
    if base == "shifted":
        least = path.level(path.first)
        plain = at_times(path, evenly(path.last, float(path.time(Level(least.alpha, shift * least.sigma))), checked(steps)))
    return at_times(path, [float(path.time(Level(lv.alpha, shift * lv.sigma))) for lv in plain[:-1]])


def tail(levels: Sequence[Level], strength: float) -> list[Level]:
    """The end of a walk for an image noised by `strength` (0..1, 1 = all): SDEdit's start. At least one step stays."""
    if not 0 < strength <= 1:
        raise UsageError(f"strength is {strength}; it takes a number above 0, at most 1")
    steps = max(1, round((len(levels) - 1) * strength))
    return list(levels[len(levels) - 1 - steps :])


def jumps(levels: Sequence[Level], length: int = 10, times: int = 10) -> list[Level]:
    """The falling levels of a walk, every stretch of `length` steps walked `times` times, going up level by level.

    RePaint's schedule (Lugmayr et al. 2022, arXiv 2201.09865, appendix: jump length and resampling). times 1 is the walk
    itself. 250 steps with the defaults make 4571 levels. DDNM's travel_length and travel_repeat are the same two numbers.
    Raises UsageError where either is below 1.
    """
    if length < 1 or times < 1:
        raise UsageError(f"jumps takes a length and a number of times of 1 or more, got {length} and {times}")
    place, last = 0, len(levels) - 2  # the last level, the clean one, is reached once
    left = dict.fromkeys(range(last, length - 1, -length), times - 1)
    walk = []
    while place <= last:
        walk.append(place)
        if left.get(place, 0) > 0:
            left[place] -= 1
            walk += range(place - 1, place - length - 1, -1)
            place -= length
        place += 1
    return [levels[i] for i in (*walk, len(levels) - 1)]


def at_times(path: Path, times: Sequence[float]) -> list[Level]:
    """The levels of falling times (a time met twice is kept once), then the clean one."""
    kept = [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
    return [*(path.level(t) for t in kept), CLEAN]


def at_ratios(path: Path, ratios: Sequence[float]) -> list[Level]:
    """The path's levels of falling sigma / alpha, then the clean one. What a table does not reach is its end, once."""
    return at_times(path, [float(path.time(Level(1.0, r))) for r in ratios])


def ends(path: Path, sigma_min: float | None, sigma_max: float | None, spacing: str) -> tuple[float, float]:
    """(low, high) of sigma / alpha, by default the path's. Raises UsageError, naming the spacing, where that is no interval."""
    low = path.level(path.first).ratio if sigma_min is None else sigma_min
    high = path.level(path.last).ratio if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise UsageError(
            f"{spacing} needs 0 < sigma_min < sigma_max < inf, got {low:.4g} and {high:.4g}"
            + ("; this path ends in alpha = 0, give sigma_max" if math.isinf(high) else "")
        )
    return low, high


def _time(path: Path, place: float) -> float:
    """The path's time at a place of 0..span - 1: a table's index, or so many thousandths after the first one."""
    return path.first + place * (1.0 if path.discrete else path.first)


def _span(path: Path, steps: int) -> int:
    """How many times the path has: the length of its table, or thousandths of its clock."""
    if not (path.discrete or math.isclose(path.last, 1000 * path.first)):
        raise UsageError(f"{type(path).__name__} has no table of times; use karras or linspace")
    checked(steps)
    return round(path.last - path.first) + 1 if path.discrete else 1000


def checked(steps: int) -> int:
    """The number of steps. Raises UsageError outside 1..MOST_STEPS."""
    if not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"steps is {steps}; it takes 1 to {MOST_STEPS}")
    return steps


def evenly(start: float, end: float, count: int) -> list[float]:
    """`count` evenly spaced numbers, both ends included; one is the start."""
    return [start + (end - start) * i / max(1, count - 1) for i in range(count)]


def _nearest(value: float) -> int:
    return round(value)
