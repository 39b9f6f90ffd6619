"""Trajectory Consistency Distillation, Zheng et al. 2024, arXiv 2402.19159: strategic stochastic sampling.

A step along the trajectory to a level s below the next one, and fresh noise up to it. The paper's s is (1 - gamma) of the
next time on the network's clock, which levels do not have; here it is (1 - gamma) of the next u = sigma / (alpha + sigma),
the clock of flow paths. Gamma 0 and 1 are the same on every clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.expansion import fall
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class TCD(Sampler):
    """Consistency sampling for distilled networks that keeps a part of the noise.

    Down past the next level, and up to it with fresh noise.

    eta: the paper's gamma, 0 to 1; 0 is DDIM, 1 draws all of the noise anew as LCM does.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UsageError(f"tcd: eta is {self.eta}; it takes 0 to 1")

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """alpha' x0 + sigma' (kept noise + sqrt(1 - kept^2) z), with kept the fall of sigma / alpha from `there` to s."""
        estimate = denoise(x, here)
        if self.eta == 0 or there.sigma == 0:
            return Step(there.mix(estimate.x0, estimate.noise), estimate)
        u = (1 - self.eta) * float(there.u)
        kept = fall(there, Level(1 - u, u))
        mixed = kept * estimate.noise + (1 - kept**2) ** 0.5 * noise("step")
        return Step(there.mix(estimate.x0, mixed), estimate)
