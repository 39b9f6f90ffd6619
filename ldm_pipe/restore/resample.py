"""ReSample: Solving Inverse Problems with Latent Diffusion Models via Hard Data Consistency, Song et al. 2023.

arXiv 2307.08123, algorithm 1. The hard problem is solved in closed form where the operator is linear, and by one Gauss-Newton
step on latents, instead of AdamW's hundreds; the clean latents that it starts from are the network's, without the official
code's few further steps. The variance is as coded there (the paper's divides by abar_t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.latent import Latent
from ldm_pipe.restore.operator import Measurement, ancestral, norm, through
from ldm_pipe.walk import Sampler, Step, Wrapping


class Count(NamedTuple):
    """The wrapped sampler's memory, and how many steps were done since the data began to count."""

    inner: Any = None
    steps: int = 0


@dataclass(frozen=True)
class ReSample(Wrapping):
    """Latent DPS around another sampler (ddim in the paper, 500 steps), and the data met at every `every`-th step.

    There z0 becomes latents whose image fits the data, and z a draw from the product of two Gaussians, N(alpha_s z0, sigma_s^2)
    and N(z, gamma * the ancestral variance). measurement: of the images. scale: of DPS, times abar_t. begin: not before u =
    sigma / (alpha + sigma) is below it; fine: below it the data are met in latents, above it in pixels that are encoded again.
    The paper's thirds of the steps, on Stable Diffusion's table. every 0: never.
    """

    measurement: Measurement
    codec: Codec
    sampler: Sampler
    scale: float = 0.5
    every: int = 10
    gamma: float = 40.0
    begin: float = 0.8
    fine: float = 0.47

    @property
    def _latent(self) -> Measurement:
        m = self.measurement
        return Measurement(Latent(m.operator, self.codec), m.y, m.deviation)

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler, one of the gradient, and at times the data."""
        count = memory or Count()
        if self.scale == 0 and self.every == 0:
            return self.sampler.step(denoise, x, here, there, memory, noise)
        known, gradient = through(denoise, x, here, lambda z0: norm(self._latent.misfit(z0)))
        done = self.sampler.step(known, x, here, there, count.inner, noise)
        abar = here.alpha**2 / (here.alpha**2 + here.sigma**2)
        z = done.x - self.scale * abar * gradient
        steps = count.steps + (float(here.u) < self.begin)
        if self.every and steps and steps % self.every == 0 and there.sigma:
            z = self._drawn(self._fitted(done.estimate.x0, here), z, here, there, noise)
        return done._replace(x=z, memory=Count(done.memory, steps))

    def _fitted(self, z0: Tensor, level: Level) -> Tensor:
        """Latents near z0 whose image fits the data."""
        if float(level.u) < self.fine:
            return self._latent.operator.prox(z0, 0.0, self._latent.y)
        return self.codec.encode(self.measurement.operator.prox(self.codec.decode(z0), 0.0, self.measurement.y))

    def _drawn(self, z0: Tensor, z: Tensor, here: Level, there: Level, noise: StepNoise) -> Tensor:
        own, other = there.sigma**2, self.gamma * ancestral(z0, z, here, there)[1]
        mean = (other * there.alpha * z0 + own * z) / (other + own)
        return mean + (other * own / (other + own)) ** 0.5 * noise("resample")
