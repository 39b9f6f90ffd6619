"""A distance of pictures in the features of a frozen network.

The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, Zhang et al. 2018, arXiv 1801.03924, eq. 1, with all
channels weighted alike: the learned weights belong to networks that are not at hand. The features are those of a CLIP's image
tower, such as the built-in one, so the number is no LPIPS: it is named by the tower and the digest of its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe import files
from ldm_pipe.analysis.extractor import pixel_statistics
from ldm_pipe.errors import UsageError
from train.eyes import image_half


class Perceptual(nn.Module):
    """Sum over layers of the mean over places of |a / |a| - b / |b||^2, a and b the features of two pictures."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        tower = image_half(Path(folder), "CLIPVisionModel")
        self.frozen: dict[str, Any] = {"tower": tower}  # in a mapping: no module of this one
        self.statistics = pixel_statistics(Path(folder))
        self.patch = int(tower.config.patch_size)

    def forward(self, images: Tensor, made: Tensor) -> Tensor:
        """images, made [B,3,H,W] in -1..1 -> [B], with gradients to both. Sides become multiples of the tower's patch."""
        pairs = zip(self._features(images), self._features(made), strict=True)
        return sum((a - b).square().sum(2).mean(1) for a, b in pairs)  # type: ignore[return-value]

    def _features(self, images: Tensor) -> list[Tensor]:
        """Of every layer, [B,N,D] of unit length."""
        size = [max(1, round(side / self.patch)) * self.patch for side in images.shape[2:]]
        if size != list(images.shape[2:]):  # the tower sees whole patches
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        self.frozen["tower"] = tower = self.frozen["tower"].to(images.device)
        mean, deviation = (t.to(images) for t in self.statistics)
        given: Any = {"pixel_values": (images - mean) / deviation, "interpolate_pos_encoding": True}
        layers = tower(**given, output_hidden_states=True).hidden_states[1:]
        return [F.normalize(layer[:, 1:].float(), dim=2, eps=1e-10) for layer in layers]  # without the class token


def named(folder: Path) -> str:
    """ "clip(name) sha256". Raises UsageError where the folder holds no weights."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UsageError(f"task.tower {str(folder)!r} holds no model.safetensors")
    return f"clip({folder.name}) {files.sha256(weights)}"
