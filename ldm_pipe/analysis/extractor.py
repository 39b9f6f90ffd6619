"""What turns pictures into features: a network with a name and the digest of its weights, printed beside every number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm_pipe import image
from ldm_pipe.configs import read_json
from ldm_pipe.errors import ModelError
from ldm_pipe.files import sha256

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Extractor:
    """name: such as "clip(mine)"; digest: SHA-256 of its weights; images: pictures -> [N,D]; texts: captions -> [N,D], None
    where it reads no text."""

    name: str
    digest: str
    images: Callable[[Sequence[Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None = None

    def __str__(self) -> str:
        """The name with the beginning of the digest, as it belongs behind a number: "FD[clip(mine) 3f2a91c0]"."""
        return f"{self.name} {self.digest[:8]}"


def pixel_statistics(folder: Path) -> tuple[Tensor, Tensor]:
    """(mean, deviation) that a CLIP wants taken out of pixels in -1..1, [3,1,1] each, by its preprocessor_config.json; (0, 1)
    where it has none."""
    path = folder / "preprocessor_config.json"
    config = read_json(path) if path.is_file() else {}
    mean, deviation = (torch.tensor(config.get(k, [0.5] * 3))[:, None, None] for k in ("image_mean", "image_std"))
    return 2 * mean - 1, 2 * deviation  # the file speaks of pixels in 0..1


def clip_extractor(folder: str | Path, tokenizer: str | Path | None = None, batch: int = 32) -> Extractor:
    """The projected features of a CLIP in transformers' layout; tokenizer: its folder, where captions are to be read too.

    The built-in model has one: `clip_extractor(BUILTIN / "clip", BUILTIN / "tokenizer")`. Raises ModelError where the folder
    holds no CLIP.
    """
    from transformers import CLIPModel, CLIPTokenizer

    folder = Path(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{str(folder)!r} holds no model.safetensors")
    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    side = int(model.config.vision_config.image_size)
    mean, deviation = pixel_statistics(folder)

    @torch.no_grad()
    def images(pictures: Sequence[Image]) -> Tensor:
        scaled = [p.convert("RGB").resize((side, side), 3) for p in pictures]  # 3: bicubic
        parts = [(image.to_tensor(scaled[i : i + batch]) - mean) / deviation for i in range(0, len(scaled), batch)]
        return torch.cat([model.visual_projection(model.vision_model(pixel_values=p).pooler_output) for p in parts])

    if tokenizer is None:
        return Extractor(f"clip({folder.name})", sha256(weights), images)
    words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        ids = words([*captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    return Extractor(f"clip({folder.name})", sha256(weights), images, texts)
