"""DPM-Solver++(2S): DPM-Solver++, Lu et al. 2022, arXiv 2211.01095, algorithm 1. (1S is Euler.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.expansion import between, fall
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DPM2S(Sampler):
    """DPM-Solver++(2S): second order with two evaluations a step, from the x0 of a level within the step.

    The steps out of alpha = 0 and into sigma = 0 are Euler's.

    r: which part of the step of log(alpha / sigma) that level lies at, above 0, at most 1; 1 is Heun's with average x0.
    """

    r: float = 0.5
    calls: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.r <= 1:
            raise UsageError(f"dpm2s: r is {self.r}; it takes a number above 0, at most 1")

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one at an end point. alpha' (1 - e^-h) weighs x0 = (1 - 1 / 2r) x0_first + x0_second / 2r."""
        first = denoise(x, here)
        x = there.mix(first.x0, first.noise)
        if here.alpha == 0 or there.sigma == 0:
            return Step(x, first)
        inside = between(here, there, self.r)
        second = denoise(inside.mix(first.x0, first.noise), inside)
        return Step(x + there.alpha * (1 - fall(here, there)) / (2 * self.r) * (second.x0 - first.x0), first)
