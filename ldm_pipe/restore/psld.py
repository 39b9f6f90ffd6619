"""PSLD: Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models, Rout et al. 2023.

arXiv 2307.00619, algorithm 2. A+ stands where the paper has A', which it takes to be the same; norms are per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement, norm, through
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True)
class PSLD(Wrapping):
    """After a step of another sampler (ddim in the paper), latents x move down the gradient of omega |y - A D(z0)| + gamma |z0
    - E(A+ y + (1 - A+ A) D(z0))|, z0 = x0(x).

    measurement: of the images. omega: of the data; gamma: of the gluing, which wants z0 to be what its image with the data put
    in encodes to. 1 and .1 for Stable Diffusion; both 0 are the sampler itself.
    """

    measurement: Measurement
    codec: Codec
    sampler: Sampler
    omega: float = 1.0
    gamma: float = 0.1

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler and one of the gradient, which goes through the network, the decoder and the encoder."""
        if self.omega == 0 and self.gamma == 0:
            return self.sampler.step(denoise, x, here, there, memory, noise)
        known, gradient = through(denoise, x, here, self._loss)
        done = self.sampler.step(known, x, here, there, memory, noise)
        return done._replace(x=done.x - gradient)

    def _loss(self, z0: Tensor) -> Tensor:
        image = self.codec.decode(z0)
        glued = self.codec.encode(self.measurement.linear.prox(image, 0.0, self.measurement.y))
        return self.omega * norm(self.measurement.misfit(image)) + self.gamma * norm(z0 - glued)
