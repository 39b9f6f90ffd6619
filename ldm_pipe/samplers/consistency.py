"""Consistency Models, Song et al. 2023, arXiv 2303.01469: multistep sampling (algorithm 1) and the boundary (eq. 5, section 3).

Everything is said in s = sigma / alpha and y = x / alpha, the paper's t and x. A consistency network ends at sigma_min and not
at 0: f(y, sigma_min) = y, so that the noise put back has variance s^2 - sigma_min^2. The x0 of an EDM network, D = c_skip y +
c_out F, becomes f by their weights in place of EDM's:

    c_skip = d^2 / ((s - sigma_min)^2 + d^2),  c_out = d (s - sigma_min) / sqrt(s^2 + d^2),  d the deviation of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class Consistency(Sampler):
    """Multistep consistency sampling for distilled networks: x0, and the noise anew down to sigma_min; 1 to 4 steps.

    With sigma_min 0 and no boundary it is LCM's.

    sigma_min: where the network's trajectories end, in sigma / alpha. boundary: is the network an EDM one whose output is yet
    to be weighted so that f(x, sigma_min) = x? data_std: of the data it was weighted with.
    """

    sigma_min: float = 0.002
    boundary: bool = False
    data_std: float = 0.5

    def __post_init__(self) -> None:
        if not (0 <= self.sigma_min < 1 and self.data_std > 0):
            got = f"{self.sigma_min:g} and {self.data_std:g}"
            raise UsageError(f"consistency: sigma_min takes 0 to 1, data_std above 0; got {got}")

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """alpha' (f + sqrt(s'^2 - sigma_min^2) z); the step into sigma = 0 returns f."""
        estimate = denoise(x, here)
        end = self._weighted(x, estimate.x0, here) if self.boundary and here.alpha != 0 else estimate.x0
        if there.sigma == 0:
            return Step(there.alpha * end, estimate)
        fresh = max(there.sigma**2 - (there.alpha * self.sigma_min) ** 2, 0.0) ** 0.5
        return Step(there.alpha * end + fresh * noise("step"), estimate)

    def _weighted(self, x: Tensor, x0: Tensor, here: Level) -> Tensor:
        """f, with F = (x0 - d^2 / (s^2 + d^2) y) sqrt(s^2 + d^2) / (s d)."""
        s, d, y = here.ratio, self.data_std, x / here.alpha
        left = max(s - self.sigma_min, 0.0)
        raw = (x0 - d * d / (s * s + d * d) * y) / s  # F d / sqrt(s^2 + d^2)
        return d * d / (left * left + d * d) * y + left * raw
