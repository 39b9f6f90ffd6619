"""Pictures that say where things are: given beside a picture, or its edges."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import image
from ldm_pipe.errors import UsageError
from train.data.dataset import Dataset, Seen

THRESHOLD = 0.3  # of the slope between 0 and 1 from which a pixel is an edge


def edges(pixels: Tensor) -> Tensor:
    """White lines on black where a picture [3,H,W] in -1..1 changes: [3,H,W] of 0 and 1 (Sobel's slope above a threshold)."""
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4
    both = torch.stack([kernel, kernel.T])[:, None]
    slopes = F.conv2d(F.pad((pixels[:, None] + 1) / 2, (1, 1, 1, 1), mode="replicate"), both)
    steepest = slopes.square().sum(1).sqrt().amax(0)
    return (steepest > THRESHOLD).float().expand(3, -1, -1)


def hint(data: Dataset, seen: Seen, kind: str, picture: Any) -> Tensor:
    """What a visit's picture [3,H,W] in -1..1 is steered by, [3,H,W] in 0..1. kind: "given" or "edges". Raises UsageError where
    none is given."""
    if kind == "edges":
        return edges(picture)
    given = data.condition(seen)
    if given is None:
        words = 'has no picture beside it that steers it, such as photo.condition.png; hint = "edges" makes one'
        raise UsageError(f"{data.name(seen)!r} {words}")
    return image.to_tensor([given])[0] / 2 + 0.5
