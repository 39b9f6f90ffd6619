"""A picture behind x: a U-Net gets further channels, whose weights begin at zero, and all of it learns on.

InstructPix2Pix, Brooks et al. 2022, arXiv 2211.09800, section 3.2: the latents of the picture to edit, dropped at 5% of visits,
learning rate 1e-4. Inpainting: Rombach et al. 2022, arXiv 2112.10752, section 4.5: a mask and the picture without its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import files, image, loading
from ldm_pipe.errors import UsageError
from ldm_pipe.parts import read_json
from train import folder as model_folder
from train.data.cache import key_of
from train.data.dataset import Seen
from train.data.order import stream
from train.data.precomputed import digest, pixels
from train.job import Batch
from train.tasks.finetune import Finetune

SIDES = (0.25, 1.1)  # of a box that is drawn anew, as shares of the picture's; from 1 on it is a strip, as outpainting has


@dataclass(frozen=True)
class Concat(Finetune):
    """Fine-tuning with a picture behind x; the export is a model folder that `--init-image` feeds.

    kind: "picture" (photo.condition.png is edited into photo.png) or "masked" (a random box of photo.png is drawn anew). blind:
    share of visits without the picture. A model without the channels is given them, and kept in the cache.
    """

    beside: ClassVar[bool] = True
    shows: ClassVar[bool] = False

    kind: Literal["picture", "masked"] = "picture"
    blind: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings.cache:
            raise UsageError("data.cache is empty; the widened model is kept there")
        if self.held_out or self.prompts:
            raise UsageError("concat validates nothing by itself: set held_out to 0 and prompts to []")

    @cached_property
    def source(self) -> Path:
        """The model's folder, or one with the further channels, made where it is not there yet."""
        frame = self.frame
        if not (frame / "unet").is_dir():
            raise UsageError("concat takes a model with a U-Net")
        latent = int(read_json(frame / "vae" / "config.json").get("latent_channels", 4))
        extra = latent + (self.kind == "masked")
        held = int(read_json(frame / "unet" / "config.json").get("in_channels", 4))
        if held == latent + extra:
            return frame
        if held != latent:
            raise UsageError(
                f"the U-Net has {held - latent} further channels; {self.kind} takes {extra}, or none to begin with"
            )
        key = key_of(frame=digest(frame, ""), kind=self.kind)
        folder = Path(self.settings.cache) / f"concat-{key[:16]}"
        if not folder.exists():
            with files.new_folder(folder) as temp:
                widen(frame, temp, extra)
        return folder

    @cached_property
    def bundle(self) -> Any:
        """The model with the channels, loaded."""
        return loading.load(self.source)

    def batch(self, seed: int, ids: Any) -> Batch:
        """The samples, and "channels" [B,C',h,w] behind x."""
        seen = [self.dataset.seen(seed, i) for i in ids]
        return {**super().batch(seed, ids), "channels": torch.stack([self._behind(seed, s) for s in seen])}

    @torch.no_grad()
    def _behind(self, seed: int, seen: Seen) -> Tensor:
        rng, codec = stream(seed, "behind", seen.row, seen.visit), self.bundle.codec
        blind = rng.random() < self.blind
        if self.kind == "masked":
            own = pixels(self.dataset, seen)[None]
            anew = torch.ones_like(own[:, :1]) if blind else box(own, rng)
            latents = codec.encode(own * (1 - anew))
            return torch.cat([F.interpolate(anew, size=latents.shape[-2:]), latents], dim=1)[0]
        given = self.dataset.condition(seen)
        if given is None:
            words = "has no picture beside it that is edited into it, such as photo.condition.png"
            raise UsageError(f"{self.dataset.name(seen)!r} {words}")
        raw: Tensor = codec.raw(codec.encode(image.to_tensor([given])))[0]
        return torch.zeros_like(raw) if blind else raw


def box(like: Tensor, rng: Any) -> Tensor:
    """[1,1,H,W]: ones in a random box, zeros elsewhere."""
    found = torch.zeros_like(like[:, :1])
    height, width = (min(side, max(1, round(side * rng.uniform(*SIDES)))) for side in like.shape[-2:])
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(like.shape[-2:], (height, width), strict=True))
    found[..., top : top + height, left : left + width] = 1.0
    return found


def widen(frame: Path, folder: Path, extra: int) -> None:
    """Copy a model whose U-Net then takes `extra` further channels, its first convolution zero there."""

    def wider(config: dict[str, Any], state: dict[str, Tensor]) -> None:
        config["in_channels"] = int(config.get("in_channels", 4)) + extra
        old = state["conv_in.weight"]
        state["conv_in.weight"] = torch.cat([old, old.new_zeros(len(old), extra, *old.shape[2:])], dim=1)

    model_folder.rebuilt(frame, folder, "unet", wider)
    model_folder.write_sums(folder)
