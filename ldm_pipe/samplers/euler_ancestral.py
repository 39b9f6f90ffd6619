"""Euler ancestral, k-diffusion's `sample_euler_ancestral`.

The variance-exploding ancestral step of Score-Based Generative Modeling through Stochastic Differential Equations, Song et al.
2020, arXiv 2011.13456, appendix F: with s = sigma / alpha falling to t, fresh noise of variance t^2 (s^2 - t^2) / s^2
on top of an Euler step to what then is missing from t^2. On any path this is DDIM with the same eta; the start is Euler's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.expansion import fall
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class EulerAncestral(Sampler):
    """An Euler step to a level below the next one, then fresh noise up to it.

    eta: 0 is Euler, 1 is ancestral; above 1 until all of the noise is fresh.
    """

    eta: float = 1.0

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step; sigma_down / t = sqrt(1 - fresh^2) and sigma_up / t = fresh, which are finite out of alpha = 0 too."""
        estimate = denoise(x, here)
        fresh = min(1.0, self.eta * (1 - fall(here, there) ** 2) ** 0.5)
        if fresh == 0 or there.sigma == 0:
            return Step(there.mix(estimate.x0, estimate.noise), estimate)
        mixed = (1 - fresh**2) ** 0.5 * estimate.noise + fresh * noise("step")
        return Step(there.mix(estimate.x0, mixed), estimate)
