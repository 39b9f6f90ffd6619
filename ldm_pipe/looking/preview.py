"""Pictures of a run while it runs, without the decoder: a linear map from latent to colour, fitted to the codec, or a tiny
autoencoder that the user names.

The map is affine in the channels of a latent pixel and gives the mean colour of the pixels below it; of all such maps it is
the best in least squares on round trips of the codec, in closed form. What it is fitted on are smooth random colours, drawn
by a fixed seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_pipe import files, image, parts
from ldm_pipe.codec import Codec
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.walk import Step

IMAGES, LATENT_SIDE = 32, 8
Look = Callable[[Tensor], Tensor]  # latents [B,C,h,w] -> colours [B,3,...] in -1..1


@dataclass(frozen=True, eq=False)
class Linear:
    """Colours in -1..1 of latent pixels: weight [3,C] @ latent + bias [3]. error: what the fit missed, root mean square."""

    weight: Tensor
    bias: Tensor
    error: float = 0.0

    def __call__(self, latents: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,3,h,w]."""
        z = latents.detach().float()
        return torch.einsum("oc,bchw->bohw", self.weight.to(z), z) + self.bias.to(z)[:, None, None]


@torch.no_grad()
def fit(codec: Codec, device: torch.device | str = "cpu") -> Linear:
    """The map of a codec, from 32 pictures of 8x8 latent pixels through its encoder and decoder; the same every time."""
    pictures = _colours(LATENT_SIDE * codec.factor).to(device)
    latents = codec.encode(pictures).float()
    seen = F.avg_pool2d(codec.decode(latents).float(), codec.factor)  # what the decoder really shows
    z = latents.movedim(1, -1).reshape(-1, codec.channels).double().cpu()
    y = seen.movedim(1, -1).reshape(-1, 3).double().cpu()
    one = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
    found = torch.linalg.lstsq(one, y, driver="gelsd").solution
    error = float((one @ found - y).square().mean().sqrt())
    return Linear(found[:-1].T.float(), found[-1].float(), error)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Colours in -1..1 by an autoencoder that takes the same latents. small: the mean colour of the pixels below a latent
    pixel, as a terminal shows it."""

    codec: Codec
    small: bool = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,3,H,W], or [B,3,h,w]."""
        images = self.codec.decode(latents.detach())
        return F.avg_pool2d(images, self.codec.factor) if self.small else images


def through(folder: str, own: Codec, device: torch.device, small: bool) -> Decoded:
    """The autoencoder of a folder in the place of a model's own. Raises UsageError where its latents are others."""
    if not (folder and Path(folder).is_dir()):
        raise ModelError(f"--preview-decoder {folder!r:.120} is not a folder; give one with an AutoencoderTiny")
    codec = parts.codec(Path(folder)).to(device, torch.float32)
    if (codec.channels, codec.factor) != (own.channels, own.factor):
        sizes = f"{codec.channels} channels, {codec.factor} pixels to one, and this model's {own.channels} and {own.factor}"
        raise UsageError(f"--preview-decoder: its latents have {sizes}")
    return Decoded(codec, small)


def pictures_of(step: Step, linear: Look, side: int) -> list[Image.Image]:
    """The estimate of a step as pictures, their longer side about `side` pixels (whole multiples of a latent pixel)."""
    small = image.to_pil(linear(step.estimate.x0))
    times = max(1, side // max(small[0].size))
    return [p.resize((p.width * times, p.height * times), Image.Resampling.NEAREST) for p in small]


def to_file(path: str | Path, linear: Look, side: int = 256) -> Callable[[Step], None]:
    """After every step, all images of the batch as one sheet in one file, replaced whole each time."""
    from ldm_pipe.recipe import encode

    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(Path(path).suffix.lower(), "PNG")

    def show(step: Step) -> None:
        files.write(path, encode(image.grid(pictures_of(step, linear, side)), None, kind), replace=True)

    return show


def to_terminal(say: Callable[[str], object], linear: Look, columns: int = 80) -> Callable[[Step], None]:
    """After every step, the first images of the batch in 24-bit colours, two pixels a letter; each one over the last one."""

    def show(step: Step) -> None:
        small = image.to_pil(linear(step.estimate.x0))
        fit_in = max(1, (columns + 1) // (small[0].width + 1))
        lines = _letters(small[:fit_in])
        back = f"\x1b[{len(lines)}F" if step.number else ""
        say(back + "\n".join(lines) + "\n")

    return show


def _letters(pictures: Sequence[Image.Image]) -> list[str]:
    """Pictures side by side, an upper half block a letter: its colour above, its background below."""
    rows = np.concatenate([np.pad(np.asarray(p), ((0, p.height % 2), (0, 1), (0, 0))) for p in pictures], axis=1)
    lines = []
    for above, below in zip(rows[::2], rows[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{u};{v};{w}m\u2580" for (r, g, b), (u, v, w) in zip(above, below, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines


@functools.cache
def _colours(side: int) -> Tensor:
    """[32,3,side,side] in -1..1: random colours on grids of 1 to 8 cells, blended."""
    random = np.random.Generator(np.random.Philox(key=0))
    made = []
    for k in range(IMAGES):
        cells = (1, 2, 4, 8)[k % 4]
        grid = torch.from_numpy(random.uniform(-1, 1, (1, 3, cells, cells))).float()
        made.append(F.interpolate(grid, (side, side), mode="bilinear", align_corners=False))
    return torch.cat(made)
