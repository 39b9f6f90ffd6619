"""SDE-DPM-Solver++(2M): DPM-Solver++, Lu et al. 2022, arXiv 2211.01095 (its solvers of the reverse SDE).

With lambda = log(alpha / sigma), h its step and g = (1 + eta) h (eta as in k-diffusion's `sample_dpmpp_2m_sde`; the paper's SDE
is eta = 1), x0 still: x' = (sigma' / sigma) e^(-eta h) x + alpha' (1 - e^-g) x0 + sigma' sqrt(1 - e^(-2 eta h)) z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldm_pipe.expansion import fall, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DPM2MSDE(Sampler):
    """SDE-DPM-Solver++(2M): the x0 of DPM-Solver++(2M), with noise that is partly drawn anew.

    The first step (also out of alpha = 0) and the step into sigma = 0 are first order.

    eta: 0 is DPM-Solver++(2M) with its midpoint rule, 1 is the reverse SDE. solver: "midpoint" takes the extrapolated x0 of the
    middle of the step, "heun" integrates the line through the last two.
    """

    eta: float = 1.0
    solver: Literal["midpoint", "heun"] = "midpoint"

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (lambda, x0) of this level and the last."""
        estimate = denoise(x, here)
        x0, mixed = estimate.x0, estimate.noise
        seen = remember(memory, here.log_snr / 2, x0, 2)
        if there.sigma == 0:
            return Step(there.mix(x0, mixed), estimate, seen)
        kept = fall(here, there) ** self.eta  # e^(-eta h)
        if kept < 1:
            mixed = kept * mixed + (1 - kept**2) ** 0.5 * noise("step")
        x = there.mix(x0, mixed)
        if len(seen) == 2:
            (now, _), (last, before) = seen
            h = there.log_snr / 2 - now
            x = x + there.alpha * self._weight(h) / (now - last) * (x0 - before)
        return Step(x, estimate, seen)

    def _weight(self, h: float) -> float:
        """The integral of (1 + eta) e^((1 + eta) (t - h)) t over 0..h, or that of the midpoint's t = h / 2."""
        g = (1 + self.eta) * h
        return -math.expm1(-g) * h / 2 if self.solver == "midpoint" else (g + math.expm1(-g)) / (1 + self.eta)
