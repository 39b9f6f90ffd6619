"""Latent Consistency Models, Luo et al. 2023, arXiv 2310.04378, section 4.3 and algorithm 1: the times of distillation.

A consistency network was distilled at some times alone (`train` of them, evenly spread). A walk takes every so many of these; a
time between two of them was never trained.
"""

from __future__ import annotations

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Path
from ldm_pipe.levels import checked, trailing


def lcm(path: Path, steps: int, train: int = 50) -> list[Level]:
    """Some of the `train` times at which a consistency network was distilled, from the last one down."""
    if train < 1:
        raise UsageError(f"lcm: train is {train}; it takes 1 or more")
    count = min(train, int(path.last) + 1) if path.discrete else train
    walk = trailing(path, count)[:-1]
    chosen = [walk[i * count // checked(steps)] for i in range(checked(steps))]
    return [*dict.fromkeys(chosen), CLEAN]
