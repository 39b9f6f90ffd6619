"""Time travel for any sampler: Wang et al. 2022 (DDNM), arXiv 2212.00490, section 3.3, algorithm 2.

A rise in the levels is a draw from q(x_t | x_s) of the x that was reached, as in the paper (the official code noises x0 anew).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import climb
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class Travel(Sampler):
    """Another sampler that also goes up, over levels such as those of `restore.jumps.jumps`; on falling ones it is itself."""

    travels = True

    sampler: Sampler

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The sampler's."""
        return self.sampler.start(noise, level)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Down: the sampler's step. Up: more noise, and x as its own estimate."""
        if float(there.u) > float(here.u):
            return Step(climb(x, here, there, noise("climb")), Estimate(x / here.alpha, noise("climb")))
        return self.sampler.step(denoise, x, here, there, memory, noise)
