"""Denoising Diffusion Implicit Models, Song et al. 2020, arXiv 2010.02502, eq. 12 and 16, on any path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DDIM(Sampler):
    """First order, any part of the noise kept or drawn anew.

    x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) noise + d z with d^2 = eta^2 (sigma_s / sigma_t)^2 (sigma_t^2 - r^2 sigma_s^2)
    and r = alpha_t / alpha_s. eta: 0 is deterministic, 1 is DDPM with the small variance.
    """

    eta: float = 0.0

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step; without fresh noise it is `there.mix(x0, noise)`."""
        estimate = denoise(x, here)
        if self.eta == 0 or there.sigma == 0:
            return Step(there.mix(estimate.x0, estimate.noise), estimate)
        r = here.alpha / there.alpha
        fresh = self.eta * there.sigma / here.sigma * (here.sigma**2 - (r * there.sigma) ** 2) ** 0.5
        kept = max(there.sigma**2 - fresh**2, 0.0) ** 0.5
        return Step(there.alpha * estimate.x0 + kept * estimate.noise + fresh * noise("step"), estimate)
