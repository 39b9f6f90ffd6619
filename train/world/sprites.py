"""The sprite atlas: 110 emoji, cut from one committed PNG, resized on demand."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
CELL, COLUMNS = 64, 11


@cache
def _rows() -> tuple[tuple[str, str, str, str], ...]:
    lines = (HERE / "objects.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines if line and not line.startswith("#"))  # type: ignore[misc]


@cache
def objects(split: str = "train") -> tuple[str, ...]:
    """Names of the objects of a split: "train" (104), "heldout" (6, never in a training scene) or "all"."""
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"{split!r} is not a split; choose from train, heldout, all")
    return tuple(row[0] for row in _rows() if split in ("all", row[3]))


@cache
def _plurals() -> dict[str, str]:
    return {row[0]: row[1] for row in _rows()}


def plural(name: str) -> str:
    """The plural of an object's name ("mouse" -> "mice")."""
    return _plurals()[name]


@cache
def _atlas() -> Image.Image:
    with Image.open(HERE / "atlas.png") as image:
        return image.convert("RGBA").convert("RGBa")  # premultiplied: resizing must not bleed hidden colour


@cache
def _cell(name: str) -> Image.Image:
    i = objects("all").index(name)
    x, y = i % COLUMNS * CELL, i // COLUMNS * CELL
    cell = _atlas().crop((x, y, x + CELL, y + CELL))
    return cell.crop(cell.getbbox())


@cache
def sprite(name: str, size: int) -> np.ndarray:
    """An object at `size` pixels on its longer side: float32 [h,w,4], premultiplied RGB in 0..255 and alpha in 0..1."""
    cell = _cell(name)
    scale = size / max(cell.size)
    shape = (max(1, round(cell.width * scale)), max(1, round(cell.height * scale)))
    small = np.asarray(cell.resize(shape, Image.Resampling.LANCZOS), dtype=np.float32).copy()
    small[..., 3] /= 255
    small.flags.writeable = False  # cached: a caller must not draw into it
    return small
