"""Common Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al. 2023, arXiv 2305.08891: algorithm 1 on any path.

For a network whose own table already ends in alpha = 0 (`rescale_betas_zero_snr` in its scheduler configuration) `trailing` is
enough. This is for the others: the walk begins at pure noise, and every level asks the network at the time at which
its own table has that signal-to-noise ratio. Networks that predict the noise refuse alpha = 0.
"""

from __future__ import annotations

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Path
from ldm_pipe.levels import trailing


def zero_terminal(path: Path, steps: int) -> list[Level]:
    """`trailing` with alpha shifted and scaled: the walk begins at alpha = 0 and the least noise stays (Lin et al. 2023)."""
    walk = trailing(path, steps)[:-1]
    first, last = (_alpha(path.level(t)) for t in (path.first, path.last))
    if not 0 <= last < first:
        raise UsageError("zero_terminal needs a path whose alpha falls")
    roots = [max(0.0, (_alpha(lv) - last) * first / (first - last)) for lv in walk]
    # On a path that reaches alpha = 0 nothing is moved.
    return [*([Level(a, (1 - a * a) ** 0.5) for a in roots] if last > 0 else walk), CLEAN]


def _alpha(level: Level) -> float:
    """alpha on the circle alpha^2 + sigma^2 = 1."""
    return float(level.alpha) / float(level.alpha**2 + level.sigma**2) ** 0.5
