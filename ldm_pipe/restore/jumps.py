"""Levels that rise again: RePaint's schedule, Lugmayr et al. 2022, arXiv 2201.09865, appendix (jump length and resampling)."""

from __future__ import annotations

from collections.abc import Sequence

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level


def jumps(levels: Sequence[Level], length: int = 10, times: int = 10) -> list[Level]:
    """The falling levels of a walk, every stretch of `length` steps walked `times` times, going up level by level.

    times 1 is the walk itself. 250 steps with the defaults make 4571 levels. DDNM's travel_length and travel_repeat are the
    same two numbers. Raises UsageError where either is below 1.
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
