"""Pictures to CLIP's view of them: what image prompts are made of.

Learning Transferable Visual Models From Natural Language Supervision, Radford et al. 2021, arXiv 2103.00020, section 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.image import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's own pictures, in 0..1


@dataclass(frozen=True, eq=False)
class ImageTower:
    """A CLIPVisionModelWithProjection or SiglipVisionModel of transformers. side: of the square it sees, in pixels; mean, std:
    what a picture in 0..1 is normalised by. whole: it sees all of a picture, drawn to a square, not the middle (SigLIP)."""

    encoder: Any
    side: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    whole: bool = False

    def pixels(self, pictures: Sequence[Image]) -> Tensor:
        """[N,3,side,side]: the shorter side brought to `side`, the middle cut out, or both sides; normalised."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        whole = to_tensor([self._square(p.convert("RGB")) for p in pictures])
        return ((whole / 2 + 0.5 - mean) / std).to(self.encoder.device, self.encoder.dtype)

    def _square(self, picture: Image) -> Image:
        from PIL.Image import Resampling

        if self.whole:
            return picture.resize((self.side, self.side), Resampling.BICUBIC)
        short = min(picture.size)
        width, height = (int(self.side * n / short) for n in picture.size)
        resized = picture.resize((width, height), Resampling.BICUBIC)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return resized.crop((left, top, left + self.side, top + self.side))

    @torch.no_grad()
    def embeds(self, pixels: Tensor) -> Tensor:
        """[N,P]: one projected vector a picture."""
        found: Tensor = self.encoder(pixels).image_embeds
        return found

    @torch.no_grad()
    def states(self, pixels: Tensor) -> Tensor:
        """[N, 1 + patches, width] before the last layer."""
        found: Tensor = self.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return found
