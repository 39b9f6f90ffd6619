"""Repairing compressed images: A is JPEG's quantiser, with a derivative to guide by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Operator
from ldm_pipe.restore.spectrum import blocks, unblocks

# ITU-T T.81 (1992), annex K.1: how coarsely each frequency of a block is kept, for lightness and for colour.
LIGHT = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
COLOUR = (
    (17, 18, 24, 47, *[99] * 4), (18, 21, 26, 66, *[99] * 4), (24, 26, 56, *[99] * 5), (47, 66, *[99] * 6),
    *[(99,) * 8] * 4,
)  # fmt: skip
# ITU-T T.871 (2011), section 7: lightness and two colour differences from red, green and blue.
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


@dataclass(frozen=True)
class JPEG(Operator):
    """What JPEG keeps of an image at a quality of 1..100: [B,3,H,W] -> the same, not clamped. No chroma subsampling.

    Each 8 x 8 block's cosine transform is rounded to multiples of the table's numbers. The forward pass rounds; the derivative
    passes through the rounding as if it were not there (Estimating or Propagating Gradients Through Stochastic Neurons, Bengio
    et al. 2013, arXiv 1308.3432). Raises UsageError for other channels or sides that are no multiples of 8.
    """

    quality: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UsageError(f"jpeg takes a quality of 1 to 100, got {self.quality}")

    def __call__(self, x: Tensor) -> Tensor:
        """Compressed and decompressed."""
        if x.shape[1] != 3 or x.shape[2] % 8 or x.shape[3] % 8:
            raise UsageError(f"jpeg takes images of 3 channels and sides that are multiples of 8, got {list(x.shape[1:])}")
        mix, cosine, table = _constants(self.quality, x)
        light = torch.einsum("ij,bjhw->bihw", mix, x * 127.5 - 0.5)  # 0..255 less 128, as the standard has it
        c = cosine @ blocks(light, 8) @ cosine.T / table
        c = (c + (c.round() - c).detach()) * table
        light = unblocks(cosine.T @ c @ cosine)
        return (torch.einsum("ij,bjhw->bihw", torch.linalg.inv(mix), light) + 0.5) / 127.5


def _constants(quality: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The colour matrix [3,3], the orthonormal cosine transform [8,8], the table of each channel [3,1,1,8,8]."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality  # as the Independent JPEG Group's library scales them
    table = (like.new_tensor([LIGHT, COLOUR, COLOUR]) * scale + 50).div(100).floor().clamp(1, 255)
    place = torch.arange(8, dtype=torch.float64)
    cosine = torch.cos(math.pi / 8 * place[:, None] * (place + 0.5)) / 2
    cosine[0] /= math.sqrt(2)
    return like.new_tensor(YCC), cosine.to(like), table[:, None, None]
