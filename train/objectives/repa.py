"""REPA: the features of a frozen encoder as a second teacher.

Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think, Yu et al. 2024,
arXiv 2410.06940, eq. 8: minus the mean cosine between a projection of hidden features and the encoder's, weight 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.analysis.extractor import pixel_statistics
from ldm_pipe.errors import UsageError
from train.eyes import image_half


class Alignment(nn.Module):
    """A projection head of three layers on the output of the module `site` of a network. Trained along, never exported.

    width: channels of that output ([B,width,h,w], or [B,N,width] with N a square); features: channels of the encoder's.
    """

    def __init__(self, site: str, width: int, features: int, hidden: int = 0) -> None:
        super().__init__()
        self.site = site
        hidden = hidden or 2 * max(width, features)
        layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)]
        self.head = nn.Sequential(*layers)

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[list[Tensor]]:
        """Collect what the site puts out while a `with` runs; nothing stays in the network."""
        modules = dict(network.named_modules())
        if self.site not in modules:
            raise UsageError(f"repa: the network has no module {self.site!r}")
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            seen.append(out[0] if isinstance(out, tuple) else out)

        handle = modules[self.site].register_forward_hook(note)
        try:
            yield seen
        finally:
            handle.remove()

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """hidden as the site gives it, target [B,features,H,W] -> 1 - cosine, averaged over places, [B]."""
        places = _as_map(hidden).permute(0, 2, 3, 1)  # [B,h,w,width]
        wanted = F.interpolate(target, size=places.shape[1:3], mode="bilinear", antialias=False, align_corners=False)
        mine = self.head(places.float()).permute(0, 3, 1, 2)
        return 1 - F.cosine_similarity(mine.float(), wanted.float(), dim=1).mean(dim=(1, 2))


def _as_map(hidden: Tensor) -> Tensor:
    """[B,N,D] tokens as [B,D,side,side]; maps as they are."""
    if hidden.ndim == 4:
        return hidden
    side = round(hidden.shape[1] ** 0.5)
    if side * side != hidden.shape[1]:
        raise UsageError(f"repa: {hidden.shape[1]} tokens are not a square map")
    return hidden.transpose(1, 2).reshape(len(hidden), -1, side, side)


class Teacher(nn.Module):
    """A frozen CLIP image tower and the head that is aligned with it. folder: in transformers' layout."""

    def __init__(self, folder: str, site: str, width: int, weight: float) -> None:
        super().__init__()
        vision = image_half(Path(folder), "CLIPVisionModel")
        self.weight, self.side = weight, int(vision.config.image_size)
        self.head = Alignment(site, width, vision.config.hidden_size)
        self.statistics = pixel_statistics(Path(folder))
        self.frozen = {"vision": vision}  # in a mapping: no module of this one

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """weight * (1 - cosine) with the features of clean images [B,3,H,W] in -1..1: [B]."""
        self.frozen["vision"] = vision = self.frozen["vision"].to(images.device)
        mean, deviation = (t.to(images) for t in self.statistics)
        scaled = F.interpolate(images, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        with torch.no_grad():
            tokens = vision(pixel_values=(scaled - mean) / deviation).last_hidden_state[:, 1:]  # without the class token
        return self.weight * self.head(hidden, _as_map(tokens))


@dataclass(frozen=True)
class Repa:
    """The [repa] table. encoder: a folder with a CLIP; site: the module of the network whose output is aligned; weight: of
    the term."""

    encoder: str
    site: str
    weight: float = 0.5

    def teacher(self, width: int) -> Teacher:
        """The module that is trained along, for a site of that many channels."""
        if not Path(self.encoder).is_dir():
            raise UsageError(f"repa.encoder {self.encoder!r} is not a folder")
        return Teacher(self.encoder, self.site, width, self.weight)


def width_of(hidden: Tensor) -> int:
    """Channels of what a site puts out."""
    return hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2]
