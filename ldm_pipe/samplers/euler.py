"""Euler's method on the probability-flow ODE.

In variance-exploding coordinates, y = x / alpha with s = sigma / alpha, the ODE is dy/ds = noise (Karras et al. 2022, arXiv
2206.00364, eq. 3), so an Euler step is y + (s' - s) noise = x0 + s' noise. In flow coordinates, y = x / (alpha + sigma), it is
dy/du = noise - x0 and the step is (1 - u') x0 + u' noise. Both are the same point: `there.mix(x0, noise)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class Euler(Sampler):
    """First order, one evaluation a step, on every path. The walk starts at noise of scale sigma, as k-diffusion's does."""

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """x0 and noise mixed at the next level."""
        estimate = denoise(x, here)
        return Step(there.mix(estimate.x0, estimate.noise), estimate)
