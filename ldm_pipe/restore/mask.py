"""Inpainting: A keeps some pixels and sets the others to 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Mask(Linear):
    """Keeps the known pixels: [B,C,H,W] -> the same, 0 where unknown.

    known: "half" (the left half), "box" (all but a box in the middle with half the sides), the file of a picture of the
    image's size (white is known), or a tensor broadcastable to [B,C,H,W], True or 1 where known.
    """

    known: Tensor | str = "half"

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Coefficients are the pixels; singular values 1 and 0."""

        def same(x: Tensor) -> Tensor:
            return x

        return Spectrum(self._keep(*shape[1:]).to(like), same, same, same, same)

    def _keep(self, height: int, width: int) -> Tensor:
        if isinstance(self.known, Tensor):
            return self.known != 0
        keep = torch.ones(1, 1, height, width, dtype=torch.bool)
        if self.known == "half":
            keep[..., width // 2 :] = False
        elif self.known == "box":
            keep[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = False
        else:
            keep = _read(self.known)[None, None]
            if keep.shape[2:] != (height, width):
                raise UsageError(f"the mask {self.known!r} is {keep.shape[3]}x{keep.shape[2]}, the image {width}x{height}")
        return keep


def _read(name: str) -> Tensor:
    import numpy as np

    from ldm_pipe import image

    return torch.from_numpy(np.asarray(image.read(name, "mask, where it is neither half nor box,").convert("L")) > 127)
