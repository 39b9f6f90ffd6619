"""DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, Lu et al. 2022, arXiv 2211.01095."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DPM2M(Sampler):
    """DPM-Solver++(2M): second order with one evaluation a step, from this x0 and the last one.

    Algorithm 2. With lambda = log(alpha / sigma), h = lambda' - lambda and the last step's h0, the x0 of the step is
    extrapolated by h / (2 h0). First order are the first step, a step out of alpha = 0 and the step into sigma = 0.
    """

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (x0 and log SNR of the last level)."""
        estimate = denoise(x, here)
        x0 = estimate.x0
        if memory is not None and there.sigma != 0:
            before, log_snr = memory
            last = here.log_snr - log_snr  # infinite after alpha = 0: no slope is known there
            if last > 0:  # not so after a level that was met twice
                x0 = x0 + (there.log_snr - here.log_snr) / (2 * last) * (x0 - before)
        shrink = there.sigma / here.sigma
        x = shrink * x + (there.alpha - shrink * here.alpha) * x0
        return Step(x, estimate, (estimate.x0, here.log_snr))
