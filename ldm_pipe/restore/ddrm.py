"""Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793, eq. 7 and 8.

The last step returns x0 as it is (as the official code does, where every strict comparison fails at sigma 0), so that
noiseless data are met to about 1e-3 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DDRM(Sampler):
    """Posterior-like steps per singular direction; owns its kernel and its start. 20 steps in the paper.

    eta: the share of fresh noise; eta_b: how far the data replace x0 where the noise of the next level exceeds theirs.
    """

    measurement: Measurement
    eta: float = 0.85
    eta_b: float = 1.0

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The data noised up to the level along the directions that are known better than that, noise along the others."""
        a = self.measurement.linear.spectrum(tuple(noise.shape[1:]), noise)
        z, theta = a.vt(noise), level.alpha * self.measurement.deviation / a.safe
        known = level.alpha * a.measured(self.measurement.y) + (level.sigma**2 - theta**2).clamp(min=0).sqrt() * z
        return a.v(torch.where(a.known & (theta < level.sigma), known, level.sigma * z))

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step, in coefficients of V; theta is the data's noise at the next level."""
        estimate = denoise(x, here)
        if there.sigma == 0:
            return Step(there.alpha * estimate.x0, estimate)
        a = self.measurement.linear.spectrum(tuple(x.shape[1:]), x)
        x0, y, z = a.vt(estimate.x0), a.measured(self.measurement.y), a.vt(noise("step"))
        theta = there.alpha * self.measurement.deviation / a.safe
        enough, kept = theta <= there.sigma, there.sigma * (1 - self.eta**2) ** 0.5
        unseen = there.alpha * x0 + kept * a.vt(estimate.noise) + self.eta * there.sigma * z
        away = there.alpha * (y - x0) / torch.where(enough, 1.0, theta)
        noisy = there.alpha * x0 + kept * away + self.eta * there.sigma * z
        up = (there.sigma**2 - (self.eta_b * theta) ** 2).clamp(min=0).sqrt()
        clear = there.alpha * (x0 + self.eta_b * (y - x0)) + up * z
        return Step(a.v(torch.where(a.known, torch.where(enough, clear, noisy), unseen)), estimate)
