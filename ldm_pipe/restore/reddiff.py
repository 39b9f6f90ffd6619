"""A Variational Perspective on Solving Inverse Problems with Diffusion Models, Mardani et al. 2023, arXiv 2305.04391.

Algorithm 1 (RED-diff). It fits one image to the data under the network's judgement of its noised copies, by Adam. Its noise
term (sigma / alpha) (eps(x) - eps) is the same as mu - x0(x), which is finite at alpha = 0 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step

BETAS, TINY = (0.9, 0.99), 1e-8


class Fit(NamedTuple):
    """The image [B,C,H,W], the running means of its gradient and of the gradient's square, and the steps done."""

    mu: Tensor
    mean: Tensor
    square: Tensor
    steps: int = 0


@dataclass(frozen=True)
class REDDiff(Sampler):
    """One step of Adam on mu per level: mean of (y - A mu)^2 / 2, plus weight (mu - x0(x)) per pixel, x = mu noised.

    weight: of the network against the data; rate: Adam's, in units of images in -1..1. 1000 or 100 steps; it starts from A+ y.
    What stands at a level is mu noised anew, at the end mu itself.
    """

    measurement: Measurement
    weight: float = 0.25
    rate: float = 0.1

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """A+ y, noised."""
        return level.mix(self._first(noise), noise)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of Adam. Its gradient of the data goes through the operator, not through the network."""
        estimate, first = denoise(x, here), torch.zeros_like(x)
        fit = memory or Fit(self._first(x), first, first)
        misfit = self.measurement.misfit(fit.mu)
        data = -self.measurement.operator.pullback(fit.mu, misfit) / misfit[0].numel()
        gradient = data + self.weight * (fit.mu - estimate.x0) / x[0].numel()
        n, (b, c) = fit.steps + 1, BETAS
        mean, square = b * fit.mean + (1 - b) * gradient, c * fit.square + (1 - c) * gradient**2
        mu = fit.mu - self.rate * (mean / (1 - b**n)) / ((square / (1 - c**n)).sqrt() + TINY)
        on = there.mix(mu, noise("step")) if there.sigma else there.alpha * mu
        return Step(on, estimate, Fit(mu, mean, square, n))

    def _first(self, like: Tensor) -> Tensor:
        return self.measurement.operator.prox(torch.zeros_like(like), 0.0, self.measurement.y)
