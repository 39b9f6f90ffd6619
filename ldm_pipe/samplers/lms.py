"""LMS, k-diffusion's `sample_lms`: the linear multistep method of variable steps.

In the coordinates of Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al. 2022, arXiv 2206.00364,
eq. 3, y = x / alpha and s = sigma / alpha, the ODE is dy/ds = noise; Adams-Bashforth's coefficients are the integrals of the
Lagrange polynomials over the step (Solving Ordinary Differential Equations I, Hairer et al. 1993, section III.5), here exact
and not by quadrature of a tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.expansion import bend, check_order, lebesgue, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class LMS(Sampler):
    """Linear multistep on the noise (Adams-Bashforth of variable steps), one evaluation a step.

    The order grows from 1 with the steps done; steps out of alpha = 0 and into sigma = 0 are first order (k-diffusion keeps the
    order into sigma = 0).

    order: 1 to 4; 1 is Euler.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_order("lms", self.order, 4)

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (sigma / alpha, noise) of the last `order` levels."""
        estimate = denoise(x, here)
        seen = remember(memory, here.ratio, estimate.noise, self.order)
        x = there.mix(estimate.x0, estimate.noise)
        if len(seen) > 1 and there.sigma != 0:
            x = x + there.alpha * bend(seen, lebesgue(here.ratio, there.ratio))
        return Step(x, estimate, seen)
