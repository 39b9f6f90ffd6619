"""Super-resolution: A is antialiased bicubic resizing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Axis, Spectrum, axis, separable


@dataclass(frozen=True)
class Bicubic(Linear):
    """Resizing by 1 / factor with a cubic of a = -0.5 that is widened by the factor: [B,C,H,W] -> [B,C,H/factor,W/factor].

    Cubic Convolution Interpolation for Digital Image Processing, Keys 1981, IEEE Trans. ASSP 29(6), eq. 4; as Pillow resizes
    (the weights of pixels beyond the border go to those within). Raises UsageError where the sides are no multiples.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UsageError(f"bicubic takes a factor of 1 or more, got {self.factor}")

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sides times the factor."""
        return shape[0], shape[1] * self.factor, shape[2] * self.factor

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Rows and columns are resized on their own."""
        f = self.factor
        if shape[1] % f or shape[2] % f:
            raise UsageError(f"bicubic({f}) takes images with sides that are multiples of {f}, got {shape[1]}x{shape[2]}")
        return separable(_axis(f, shape[1]), _axis(f, shape[2]), like)


@functools.lru_cache(8)
def _axis(factor: int, size: int) -> Axis:
    eye = torch.eye(size, dtype=torch.float64)[None, None]  # a picture whose columns are the unit vectors
    return axis(F.interpolate(eye, size=(size // factor, size), mode="bicubic", antialias=True, align_corners=False)[0, 0])
