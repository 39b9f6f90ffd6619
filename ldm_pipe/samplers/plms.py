"""PNDM's linear multistep part: Pseudo Numerical Methods for Diffusion Models on Manifolds, Liu et al. 2022, arXiv 2202.09778.

The noise is extrapolated with Adams-Bashforth's coefficients of even steps and carried to the next level by DDIM's
transfer (eq. 9). PNDM starts with Runge-Kutta steps and Stable Diffusion's PLMS with two evaluations in its first step;
iPNDM (Zhang and Chen 2022, arXiv 2204.13902) starts with lower orders, so that every step takes one evaluation.
That start is used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.expansion import check_order, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step

# Weights of the last noises, newest first, by how many are known.
WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class PLMS(Sampler):
    """PLMS and iPNDM: Adams-Bashforth's weights of even steps on the noise, one evaluation a step.

    The order grows from 1 with the steps done; steps out of alpha = 0 and into sigma = 0 are first order. Whatever the number
    of values, the transfer limits it to second order (as Liu et al. 2022 prove).

    order: how many noises are weighted, 1 to 4; 1 is DDIM.
    """

    order: int = 4

    def __post_init__(self) -> None:
        check_order("plms", self.order, 4)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (sigma / alpha, noise) of the last `order` levels."""
        estimate = denoise(x, here)
        seen = remember(memory, here.ratio, estimate.noise, self.order)
        x = there.mix(estimate.x0, estimate.noise)
        if len(seen) > 1 and there.sigma != 0:
            mixed = sum(w * value for w, (_, value) in zip(WEIGHTS[len(seen) - 1], seen, strict=True))
            x = x + there.alpha * (there.ratio - here.ratio) * (mixed - estimate.noise)
        return Step(x, estimate, seen)
