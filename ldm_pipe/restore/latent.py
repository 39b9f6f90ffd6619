"""Operators on latents: decode, then measure. Latent DPS is DPS with such an operator, latent DiffPIR DiffPIR."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.restore.operator import Derivative, Operator, gauss_newton
from ldm_pipe.samplewise import norm

REACH = 0.01  # how far apart the two latents are whose images tell a derivative, where latents have variance 1


@dataclass(frozen=True, eq=False)
class Latent(Operator):
    """A after D: latents [B,c,h,w] -> the measurement of the images that they decode to.

    steps: of the conjugate gradients in `prox`; a few go most of the way, many also follow what the decoder hardly sees. `prox`
    stays in latents and is exact where the decoder is affine; decoding, projecting and encoding again is another map, which
    leaves the data unmet. Latent DPS: Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion
    Models, Rout et al. 2023, arXiv 2307.00619, section 3.
    """

    operator: Operator
    codec: Codec
    steps: int = 50

    def __call__(self, x: Tensor) -> Tensor:
        """operator(codec.decode(x))."""
        return self.operator(self.codec.decode(x))

    def derivative(self, x: Tensor) -> Derivative:
        """Forward, the decoder's own is a difference, which takes no second derivative of a network."""
        image, back = torch.func.vjp(self.codec.decode, x)[:2]
        measured = self.operator.derivative(image)

        def push(v: Tensor) -> Tensor:
            reach = REACH * v[0].numel() ** 0.5 / norm(v).clamp(min=1e-30)
            return measured.push((self.codec.decode(x + reach * v) - image) / reach)

        return Derivative(measured.value, push, lambda u: back(measured.pull(u))[0])

    def prox(self, z: Tensor, rho: float, y: Tensor) -> Tensor:
        """A Gauss-Newton step from z (`gauss_newton`)."""
        return gauss_newton(self, z, rho, y, self.steps)

    def guess(self, like: Tensor, y: Tensor, deviation: float = 0.0) -> Tensor:
        """The pixels' first estimate, encoded: A+ y of the whole would be the smallest latents that fit, not a picture's."""
        return self.codec.encode(self.operator.guess(self.codec.decode(like), y, deviation))
