"""Super-resolution by averages: A is the mean of every block of factor x factor pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Spectrum, blocks, householder, unblocks


@dataclass(frozen=True)
class Pool(Linear):
    """The mean of every factor x factor block: [B,C,H,W] -> [B,C,H/factor,W/factor]. All singular values are 1 / factor.

    Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793, appendix. Raises UsageError where the
    sides are no multiples of the factor.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UsageError(f"pool takes a factor of 1 or more, got {self.factor}")

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sides times the factor."""
        return shape[0], shape[1] * self.factor, shape[2] * self.factor

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Coefficients [B,C,H/factor,W/factor,factor^2]: the mean of a block first, then what averages to 0."""
        f = self.factor
        if shape[1] % f or shape[2] % f:
            raise UsageError(f"pool({f}) takes images with sides that are multiples of {f}, got {shape[1]}x{shape[2]}")
        basis = householder(like.new_ones(f * f))
        s = like.new_zeros(f * f)
        s[0] = 1 / f

        def v(c: Tensor) -> Tensor:
            return unblocks((c @ basis.T).reshape(*c.shape[:-1], f, f))

        def ut(y: Tensor) -> Tensor:
            return torch.nn.functional.pad(y[..., None], (0, f * f - 1))

        return Spectrum(s, lambda c: c[..., 0], ut, v, lambda x: blocks(x, f).flatten(-2) @ basis)
