"""Diffusion Posterior Sampling for General Noisy Inverse Problems, Chung et al. 2022, arXiv 2209.14687, algorithm 1, eq. 16.

The gradient goes through the network. Norms are per sample (the official code takes one over the batch, which couples images).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement, norm, shifted, square, through
from ldm_pipe.walk import Sampler, Step, Wrapping

FAINT = 0.05  # |y| of a grey in the middle is 0, which nothing can be divided by


@dataclass(frozen=True)
class DPS(Wrapping):
    """After a step of another sampler (ancestral in the paper, 1000 steps), x moves by -scale * gradient of |y - A x0(x)|.

    scale: .3 for super-resolution and blur, .5 for random masks, 1 for phase retrieval; 0 is the sampler itself. The norm is
    not squared, as in the official code. poisson: for data whose noise grows with their brightness, the norm is divided by
    |y|, as there: multiplied by the mean of 1 / |y|, |y| taken for no less than FAINT. On latents, with an operator that
    decodes first, this is latent DPS.
    """

    measurement: Measurement
    sampler: Sampler
    scale: float = 0.3
    poisson: bool = False

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler and one of the gradient."""
        if self.scale == 0:
            return self.sampler.step(denoise, x, here, there, memory, noise)
        known, gradient = through(denoise, x, here, self._loss)
        done = self.sampler.step(known, x, here, there, memory, noise)
        return done._replace(x=done.x - self.scale * gradient)

    def _loss(self, x0: Tensor) -> Tensor:
        away = norm(self.measurement.misfit(x0))
        if not self.poisson:
            return away
        return away * (1 / self.measurement.y.abs().clamp(min=FAINT)).flatten(1).mean(1)


@dataclass(frozen=True)
class DPSScore:
    """The same with the squared norm, as a Guide for any sampler: the score moves by that of N(y; A x0(x), deviation^2).

    Eq. 16 with its step size 1 / (2 deviation^2) times `scale`. It leaves out that x0(x) is itself uncertain, and so
    overshoots. Raises UsageError where the deviation is 0.
    """

    measurement: Measurement
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.measurement.deviation <= 0:
            raise UsageError("dps_score divides by the data's deviation, which is 0; give one or use dps")

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the moved score. Works inside no_grad; the gradient does not go on through it."""
        if self.scale == 0:
            return denoise

        def move(x: Tensor, level: Level) -> Estimate:
            known, gradient = through(denoise, x, level, lambda x0: square(self.measurement.misfit(x0)))
            return shifted(known(x, level), -self.scale / (2 * self.measurement.deviation**2) * gradient, x, level)

        return move
