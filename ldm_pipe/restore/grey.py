"""Colourisation: A is the mean of the three colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Spectrum, householder


@dataclass(frozen=True)
class Grey(Linear):
    """The mean of red, green and blue: [B,3,H,W] -> [B,1,H,W]. Raises UsageError for images without three channels.

    Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793, appendix.
    """

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Three channels."""
        return 3, *shape[1:]

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Coefficients [B,3,H,W]: the grey axis first, its singular value is 1 / sqrt(3)."""
        if shape[0] != 3:
            raise UsageError(f"grey takes images of 3 channels, got {shape[0]}")
        basis = householder(like.new_ones(3))
        s = like.new_tensor([3**-0.5, 0.0, 0.0]).reshape(3, 1, 1)
        return Spectrum(
            s,
            lambda c: c[:, :1],
            lambda y: torch.nn.functional.pad(y, (0, 0, 0, 0, 0, 2)),
            lambda c: torch.einsum("ij,bjhw->bihw", basis, c),
            lambda x: torch.einsum("ij,bihw->bjhw", basis, x),
        )
