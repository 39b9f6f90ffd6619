"""Tensors to pictures and back, and contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in -1..1 (clamped) -> RGB pictures, rounded to the nearest of 256 values."""
    import torch

    bytes_ = (images.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(a) for a in bytes_.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> [B,3,H,W] in -1..1, fp32."""
    import numpy as np
    import torch

    stacked = np.stack([np.asarray(i.convert("RGB"), dtype=np.float32) for i in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2) / 127.5 - 1


def grid(images: Sequence[Image.Image], columns: int = 0, gap: int = 2) -> Image.Image:
    """A contact sheet, row by row, as square as it goes (or with `columns`), white between the pictures."""
    columns = columns or math.ceil(len(images) ** 0.5)
    rows = -(-len(images) // columns)
    w, h = images[0].size
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet
