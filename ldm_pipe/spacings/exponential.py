"""Even steps of log(sigma / alpha), which is -lambda: k-diffusion's exponential and DPM-Solver's logSNR spacing are one.

DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps, Lu et al. 2022, arXiv 2206.00927,
section 3.4 ("uniform in lambda").
"""

from __future__ import annotations

import math

from ldm_pipe.level import Level, Path
from ldm_pipe.levels import at_ratios, checked, ends, evenly


def exponential(path: Path, steps: int, sigma_min: float | None = None, sigma_max: float | None = None) -> list[Level]:
    """Even steps of lambda = log(alpha / sigma), so that sigma / alpha falls by one factor a step (Lu et al. 2022).

    sigma_min, sigma_max: ends of sigma / alpha; by default the path's. Raises UsageError where the path ends in alpha = 0.
    """
    low, high = ends(path, sigma_min, sigma_max, "exponential")
    return at_ratios(path, [math.exp(v) for v in evenly(math.log(high), math.log(low), checked(steps))])
