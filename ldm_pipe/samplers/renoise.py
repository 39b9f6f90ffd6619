"""The kernel of Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793, eq. 7 (null-space case).

DDNM (Wang et al. 2022, arXiv 2212.00490) uses it too, and DiffPIR (Zhu et al. 2023, arXiv 2305.08995) with zeta = eta^2.
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
class Renoise(Sampler):
    """The DDRM-style kernel: x_s = alpha_s x0 + sigma_s (sqrt(1 - eta^2) noise + eta z).

    eta: the share of fresh noise, 0..1. It is not DDIM's: 1 forgets all of the old noise.
    """

    eta: float = 0.85

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step; eta 0 is DDIM with eta 0."""
        estimate = denoise(x, here)
        if self.eta == 0 or there.sigma == 0:
            return Step(there.mix(estimate.x0, estimate.noise), estimate)
        mixed = (1 - self.eta**2) ** 0.5 * estimate.noise + self.eta * noise("step")
        return Step(there.mix(estimate.x0, mixed), estimate)
