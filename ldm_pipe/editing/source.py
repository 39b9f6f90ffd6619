"""The picture that an edit starts from: brought to the run's size, encoded, and pasted back where it is to be kept.

SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, Meng et al. 2021, arXiv 2108.01073.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.errors import UsageError
from ldm_pipe.image import digest, to_tensor


@dataclass(frozen=True, eq=False)
class Source:
    """picture: RGB; mask: greys of the same size, white = drawn anew, black = kept to the bit, None = all is drawn anew. held:
    is x0 held where the mask is dark (`Keep`), or does a method see to it?"""

    picture: Image.Image
    mask: Image.Image | None = None
    held: bool = True

    def __post_init__(self) -> None:
        """Raise UsageError where the mask has another size than the picture."""
        m, p = self.mask, self.picture
        if m is not None and m.size != p.size:
            raise UsageError(f"the mask is {m.width}x{m.height} pixels, the picture {p.width}x{p.height}")

    @classmethod
    def framed(cls, picture: Image.Image, left: int = 0, right: int = 0, top: int = 0, bottom: int = 0) -> Source:
        """A picture on a larger canvas, for outpainting: so many pixels more on each side, drawn anew; they start as the pixels
        of the picture's edge."""
        inner, sides = np.asarray(picture.convert("RGB")), ((top, bottom), (left, right))
        canvas = np.pad(inner, (*sides, (0, 0)), mode="edge")
        mask = np.pad(np.zeros(inner.shape[:2], np.uint8), sides, constant_values=255)
        return cls(Image.fromarray(canvas), Image.fromarray(mask))

    def fitted(self, width: int, height: int) -> Source:
        """Scaled to cover width x height pixels and cut to them around the middle; untouched where it has that size."""
        picture = _fit(self.picture.convert("RGB"), width, height, Image.Resampling.LANCZOS)
        mask = self.mask and _fit(self.mask.convert("L"), width, height, Image.Resampling.BILINEAR)
        return Source(picture, mask, self.held)

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the pixels of the picture and of the mask, as they were used."""
        parts = {"init_image": self.picture, "mask": self.mask}
        return {n: digest(i) for n, i in parts.items() if i}

    def latents(self, codec: Codec, device: torch.device) -> Tensor:
        """[1,C,h,w], the picture through the codec."""
        return codec.encode(self.pixels(device))

    def pixels(self, device: torch.device) -> Tensor:
        """[1,3,H,W] in -1..1."""
        return to_tensor([self.picture]).to(device)

    def latent_mask(self, factor: int, device: torch.device) -> Tensor | None:
        """[1,1,h,w] in 0..1: a latent pixel is drawn anew as much as the most redrawn of its pixels."""
        if self.mask is None:
            return None
        grey = to_tensor([self.mask.convert("RGB")])[:, :1].to(device) / 2 + 0.5
        return F.max_pool2d(grey, factor)

    def paste(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Images with the kept pixels of the picture put back, bit for bit where the mask is black."""
        return list(images) if self.mask is None else [Image.composite(i, self.picture, self.mask) for i in images]


def _fit(picture: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    return picture if picture.size == (width, height) else ImageOps.fit(picture, (width, height), resample)
