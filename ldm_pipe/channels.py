"""Further channels behind those of x, made of a picture, for U-Nets that were trained with them.

Inpainting: a mask and the picture without what it covers (Rombach et al. 2022, arXiv 2112.10752, section 4.5, as published in
stable-diffusion-inpainting). InstructPix2Pix: the whole picture (Brooks et al. 2022, arXiv 2211.09800, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.codec import Codec
from ldm_pipe.cond import Cond
from ldm_pipe.editing.source import Source
from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.guidance.compose import Compose
from ldm_pipe.image import to_tensor
from ldm_pipe.model import Rule

LIKENESS = 1.5  # how much more the picture counts than no picture: InstructPix2Pix, section 3.2.1


def rule_of(inserts: str | None, scale: float) -> Rule:
    """The usual guidance of a model. One that edits pictures is guided by the text, at `scale`, and by the picture."""
    return Compose(("cond", "image"), (scale, LIKENESS - scale)) if inserts == "picture" else CFG(scale)


def with_channels(
    conds: Mapping[str, Cond], inserts: str | None, codec: Codec, source: Source | None, size: tuple[int, int]
) -> dict[str, Cond]:
    """The branches with their further channels [B,C,h,w]. size: (height, width) in pixels.

    An inpainting model without a picture, or without a mask, draws everything anew. A model that edits pictures gets a third
    branch "image": the picture under the negative prompt. Raises UsageError where it has no picture.
    """
    if inserts is None:
        return dict(conds)
    tokens = conds["cond"].tokens
    assert tokens is not None
    if inserts == "masked":
        return {
            n: replace(c, channels=_masked(codec, source, size, tokens).expand(c.rows, -1, -1, -1)) for n, c in conds.items()
        }
    if source is None:
        raise UsageError("this model edits pictures and is given none; --init-image FILE gives it one")
    picture = codec.raw(codec.encode(source.pixels(tokens.device))).expand(conds["cond"].rows, -1, -1, -1)
    with_picture = {n: replace(conds[n], channels=picture) for n in ("cond", "uncond")}
    none = replace(conds["uncond"], channels=torch.zeros_like(picture))
    return {"cond": with_picture["cond"], "image": with_picture["uncond"], "uncond": none}


def _masked(codec: Codec, source: Source | None, size: tuple[int, int], like: Tensor) -> Tensor:
    """[1, 1 + C, h, w]: 1 = drawn anew, and the latents of the picture in which that is grey."""
    anew, picture = torch.ones(1, 1, *size, device=like.device), torch.zeros(1, 3, *size, device=like.device)
    if source is not None and source.mask is not None:
        anew = (to_tensor([source.mask.convert("RGB")])[:, :1].to(like.device) >= 0).float()
        picture = source.pixels(like.device) * (1 - anew)
    latents = codec.encode(picture)
    return torch.cat([F.interpolate(anew, size=latents.shape[-2:]), latents], dim=1)
