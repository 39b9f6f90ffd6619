"""Sizes and cuts: aspect-ratio buckets, and one sampled geometry for an image, its mask and its condition together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

Size = tuple[int, int]  # (width, height) in pixels


def bucket_sizes(side: int, step: int, most: float = 2.0) -> tuple[Size, ...]:
    """All (width, height) in multiples of `step` of at most side x side pixels, as large as they go, no longer than most : 1.

    (NovelAI Improvements on Stable Diffusion, NovelAI 2022: aspect-ratio bucketing.)
    """
    found = {(side, side)}
    for width in range(step, side * side // step + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= most:
            found |= {(width, height), (height, width)}
    best = {w: max(h for v, h in found if v == w) for w, _ in found}
    return tuple(sorted((w, h) for w, h in best.items() if max(w / h, h / w) <= most))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is closest to that of a picture of `size`, in the logarithm."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1]))


class Geometry(NamedTuple):
    """How a picture is cut. original: its size; resized: to what it is scaled; box at (left, top) of `size`; then mirrored."""

    original: Size
    resized: Size
    left: int
    top: int
    size: Size
    flip: bool

    def apply(self, picture: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """The cut of a picture; a mask or condition of another resolution is cut at the same place."""
        resized = picture if picture.size == self.resized else picture.resize(self.resized, resample)
        cut = resized.crop((self.left, self.top, self.left + self.size[0], self.top + self.size[1]))
        return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else cut

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's conditions: original height and width, top and left of the cut, target height and width.

        SDXL, Podell et al. 2023, arXiv 2307.01952, section 2.2. A mirrored cut counts its left edge from the other side.
        """
        left = self.resized[0] - self.size[0] - self.left if self.flip else self.left
        return self.original[1], self.original[0], self.top, left, self.size[1], self.size[0]


def draw(original: Size, size: Size, rng: np.random.Generator, random_crop: bool = False, flip: bool = False) -> Geometry:
    """Scale so that `size` is just covered, cut the middle (or anywhere), mirror half of the time where `flip` allows it."""
    scale = max(size[0] / original[0], size[1] / original[1])
    resized = tuple(max(s, round(o * scale)) for o, s in zip(original, size, strict=True))
    slack = [r - s for r, s in zip(resized, size, strict=True)]
    across, down, mirror = rng.random(3)  # always three, so that no setting shifts the others' draws
    left, top = (int(d * (s + 1)) if random_crop else s // 2 for d, s in zip((across, down), slack, strict=True))
    return Geometry(original, (resized[0], resized[1]), left, top, size, bool(flip and mirror < 0.5))
