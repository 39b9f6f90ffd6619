"""Align Your Steps: Optimizing Sampling Schedules in Diffusion Models, Sabour et al. 2024, arXiv 2404.14507.

The tables are the noise levels that the authors publish for three models, ten steps each, with their rule for other counts:
log-linear interpolation. They were optimised for those models, on a stochastic solver; on others they are a good guess only.
"""

from __future__ import annotations

import math
from typing import Literal

from ldm_pipe.level import Level, Path
from ldm_pipe.levels import at_ratios, checked, evenly

# sigma / alpha at the eleven ends of ten steps: Stable Diffusion 1.5, Stable Diffusion XL, Stable Video Diffusion.
TABLES = {
    "sd": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


def align_your_steps(path: Path, steps: int, model: Literal["sd", "sdxl", "svd"] = "sd") -> list[Level]:
    """The optimised levels of Stable Diffusion 1.5, XL or Video for few steps; other counts are interpolated (Sabour et al.
    2024).

    model: which table. Its last level is left out: the walk ends clean.
    """
    logs = [math.log(s) for s in TABLES[model]]
    places = evenly(0.0, len(logs) - 1.0, checked(steps) + 1)[:-1]
    return at_ratios(path, [math.exp(_line(logs, p)) for p in places])


def _line(values: list[float], place: float) -> float:
    """Between the two values around a place of 0..len - 1."""
    i = min(int(place), len(values) - 2)
    return values[i] + (place - i) * (values[i + 1] - values[i])
