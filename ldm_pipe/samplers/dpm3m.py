"""DPM-Solver++(3M): DPM-Solver++, Lu et al. 2022, arXiv 2211.01095, eq. 8 with a parabola through the last three x0.

The paper's algorithms end with 2M; 3M comes from its code (`multistep_dpm_solver_third_update`), which k-diffusion and
diffusers follow. There the second divided difference is weighted by half of its integral, which makes the method second
order. Both rules are here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldm_pipe.expansion import History, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DPM3M(Sampler):
    """DPM-Solver++(3M): third order with one evaluation a step, from this x0 and the last two.

    With lambda = log(alpha / sigma), x0 moves along the parabola through its last three values. The first step (also out of
    alpha = 0) and the step into sigma = 0 are first order, the second step is second order.

    rule: "exact" integrates the parabola; "published" halves its curvature and starts with 2M, as diffusers does.
    """

    rule: Literal["exact", "published"] = "exact"

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (lambda, x0) of this level and the last two."""
        estimate = denoise(x, here)
        seen = remember(memory, here.log_snr / 2, estimate.x0, 3)
        x = there.mix(estimate.x0, estimate.noise)
        if there.sigma != 0:
            x = x + there.alpha * self._bend(seen, there.log_snr / 2)
        return Step(x, estimate, seen)

    def _bend(self, seen: History, end: float) -> Tensor | float:
        """The integral of e^(lambda - end) (x0 - x0_now) over the step, in Newton's form of the parabola."""
        if len(seen) < 2:
            return 0.0
        (now, x0), (last, before) = seen[:2]
        h, slope = end - now, (x0 - before) / (now - last)
        linear = h + math.expm1(-h)  # integrals of e^(t - h) t and e^(t - h) t^2 over 0..h
        square = h * h - 2 * linear
        published = self.rule == "published"
        if len(seen) == 2:
            return (-math.expm1(-h) * h / 2 if published else linear) * slope
        place, older = seen[2]
        curve = (slope - (before - older) / (last - place)) / (now - place)
        return linear * slope + (square / (2 if published else 1) + (now - last) * linear) * curve
