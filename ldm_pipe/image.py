"""Tensors to pictures and back, and contact sheets."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 64_000_000


def read(path: str | os.PathLike[str], flag: str = "image") -> Image.Image:
    """A picture from an untrusted file as RGB: upright, transparency on white, 16 bits scaled to 8, the first frame.

    Raises UsageError, naming `flag` and the file, on what is no picture, is damaged or has over 64 million pixels.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {str(path)!r:.160} is not a file")
    return _decoded(path, f"{flag} {str(path)!r:.160}")


def decode(data: bytes, name: str) -> Image.Image:
    """`read` for the bytes of a picture file; `name` says in errors whose they are."""
    return _decoded(io.BytesIO(data), name)


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) that `decode` would give, read from the head of the file alone. Raises UsageError as `decode` does."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as found:
            width, height = found.size
            return (height, width) if found.getexif().get(0x0112, 1) >= 5 else (width, height)  # the tag of the orientation
    except (OSError, ValueError, SyntaxError) as error:
        raise UsageError(f"{name} cannot be read as a picture; it takes a whole {', '.join(FORMATS)} file") from error


def _decoded(source: str | os.PathLike[str] | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(source, formats=FORMATS) as found:
                if found.width * found.height > MOST_PIXELS:
                    raise UsageError(f"{name} has more than {MOST_PIXELS // 10**6} million pixels")
                found.load()
                return _plain(ImageOps.exif_transpose(found))
    except UsageError:
        raise
    except (OSError, ValueError, SyntaxError, Warning) as error:  # what Pillow raises on damaged files
        raise UsageError(f"{name} cannot be read as a picture; it takes a whole {', '.join(FORMATS)} file") from error


def _plain(picture: Image.Image) -> Image.Image:
    """8 bits of red, green and blue."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        deep = picture.convert("F")
        top = 65535.0 if picture.mode != "F" or deep.getextrema()[1] > 1 else 1.0  # type: ignore[operator]
        picture = deep.point(lambda v: v * (255.0 / top)).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def digest(picture: Image.Image) -> str:
    """SHA-256 of a picture's size and pixels, 64 hexadecimal digits."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


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
