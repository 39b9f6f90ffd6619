"""Operators on latents: decode, then measure. Latent DPS is DPS with such an operator, latent DiffPIR DiffPIR."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.restore.operator import Operator


@dataclass(frozen=True, eq=False)
class Latent(Operator):
    """A after D: latents [B,c,h,w] -> the measurement of the images that they decode to.

    Only autograd knows it. Its `prox` stays in latents and is exact where the decoder is affine; decoding, projecting and
    encoding again is another map, which leaves the data unmet. Latent DPS: Solving Linear Inverse Problems Provably via
    Posterior Sampling with Latent Diffusion Models, Rout et al. 2023, arXiv 2307.00619, section 3.
    """

    operator: Operator
    codec: Codec

    def __call__(self, x: Tensor) -> Tensor:
        """operator(codec.decode(x))."""
        return self.operator(self.codec.decode(x))
