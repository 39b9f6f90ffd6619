"""ADIR: Adaptive Diffusion for Image Reconstruction, Abu-Hussein et al. 2022, arXiv 2212.03221: its sampling.

Its adaptation, fine-tuning the network on the nearest neighbours of the picture, is a training and not done here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement, ancestral
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class ADIR(Sampler):
    """Ancestral steps whose mean m moves by scale * variance * 2 A' (y_t - A m), y_t = alpha_t y + sigma_t A noise(x).

    m lies at the level that is reached, y_t at the one that is left: so the paper has it. 1000 steps; with scale 1 the data say
    little, 0 is ancestral sampling.
    """

    measurement: Measurement
    scale: float = 5.0

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step; owns its kernel."""
        estimate, m = denoise(x, here), self.measurement
        mean, variance = ancestral(estimate.x0, x, here, there)
        if there.sigma == 0:
            return Step(mean, estimate)
        away = m.noised(here, estimate.noise) - m.linear(mean)
        mean = mean + 2 * self.scale * variance * m.operator.pullback(mean, away)
        return Step(mean + variance**0.5 * noise("step"), estimate)
