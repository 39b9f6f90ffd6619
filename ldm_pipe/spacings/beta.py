"""Beta Sampling is All You Need: Efficient Image Generation Strategy for Diffusion Models using Stepwise Spectral Analysis,
Lee et al. 2024, arXiv 2407.12173: times are quantiles of a Beta distribution, dense at both ends.

The quantiles asked for are those of `trailing`, 1, 1 - 1/n, ..., 1/n, as in the user interfaces that made the method known.
(diffusers takes quantiles 1 to 0 of sigma and not of the time, which on a table is another spacing.)
"""

from __future__ import annotations

import itertools
import math

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.levels import at_times, checked

MOST = 10.0


def beta(path: Path, steps: int, alpha: float = 0.6, beta: float = 0.6) -> list[Level]:
    """Times at the quantiles of Beta(alpha, beta): with 0.6 and 0.6 more steps at both ends of the walk (Lee et al. 2024).

    alpha, beta: above 0, at most 10; 1 and 1 is even in time.
    """
    count = checked(steps)
    if not (0.05 <= alpha <= MOST and 0.05 <= beta <= MOST):
        raise UsageError(f"beta: alpha and beta take 0.05 to {MOST:g}, got {alpha:g} and {beta:g}")
    whole = path.last - path.first
    times = [path.first + whole * quantile(1 - i / count, alpha, beta) for i in range(count)]
    return at_times(path, [float(round(t)) for t in times] if path.discrete else times)


def quantile(part: float, a: float, b: float) -> float:
    """The x in 0..1 below which lies `part` of Beta(a, b), by bisection to the last bit."""
    if part in (0, 1):
        return float(part)
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _below(middle, a, b) < part else (low, middle)
    return high


def _below(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b): its power series (Handbook of Mathematical Functions, Abramowitz and
    Stegun 1964, 26.5.4 with 15.1.1) below a half, its mirror image above."""
    if x > 0.5:
        return 1 - _below(1 - x, b, a)
    term, total = 1.0, 0.0
    for n in itertools.count(1):
        total += term / (a + n - 1)
        term *= (n - b) * x / n
        if abs(term) < 1e-18 * total:
            break
    return x**a * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
