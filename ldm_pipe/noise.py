"""Noise that belongs to an image: keyed by (seed of the image, index in the walk, tag), whatever the batch or the device.

Drawn on the CPU in float64 by NumPy's Philox (Parallel Random Numbers: As Easy as 1, 2, 3, Salmon et al. 2011): torch's CPU
generator keeps only 32 bits of a seed and differs between instruction sets.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError


class StepNoise(Protocol):
    """The draws of one step, by tag."""

    def __call__(self, tag: str = "step") -> Tensor:
        """A standard normal draw, [B,C,H,W]; the same tag gives the same draw."""


LIMIT = 2**64


def seeds_of(seed: int, count: int) -> tuple[int, ...]:
    """The seeds of `count` images: seed, seed + 1, ... Raises UsageError outside 0..2^64 - 1."""
    if not 0 <= seed <= LIMIT - count:
        raise UsageError(f"seed is {seed}; with {count} image(s) it takes 0 to {LIMIT - count}")
    return tuple(range(seed, seed + count))


@dataclass(frozen=True)
class Noise:
    """The noise of a batch of images. shape: (C, H, W) of one image; `seeds`: one per image, 0..2^64 - 1.

    `noise.at(i)(tag)` is the draw of walk index i: [B,C,H,W], standard normal. Tags keep several draws of a step apart.
    """

    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for seed in self.seeds:
            if not 0 <= seed < LIMIT:
                raise UsageError(f"seed is {seed}; it takes 0 to {LIMIT - 1}")

    def at(self, index: int) -> StepNoise:
        """The source of one step."""

        def draw(tag: str = "step") -> Tensor:
            return self._draw(index, tag)

        return draw

    def start(self) -> Tensor:
        """The noise that a run starts from."""
        return self._draw(0, "start")

    def take(self, rows: Sequence[int]) -> Noise:
        """The noise of some of the images."""
        return Noise(tuple(self.seeds[r] for r in rows), self.shape, self.device, self.dtype)

    def _draw(self, index: int, tag: str) -> Tensor:
        code = zlib.crc32(tag.encode())
        # The counter's low words advance as numbers are drawn; its high word keeps the steps apart.
        keys = (np.array([s, code], dtype=np.uint64) for s in self.seeds)  # a list would turn seeds above 2^63 into floats
        streams = (np.random.Generator(np.random.Philox(key=k, counter=[0, 0, 0, index])) for k in keys)
        draws = np.stack([g.standard_normal(self.shape) for g in streams])
        return torch.from_numpy(draws).to(device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class NoNoise:
    """A source of zeros, for walks that must not draw any and for exact propagation of means."""

    like: Tensor

    def at(self, index: int) -> StepNoise:
        """Zeros at every step."""

        def draw(tag: str = "step") -> Tensor:
            return torch.zeros_like(self.like)

        return draw


@dataclass(frozen=True, eq=False)
class Recorded:
    """Noise that was found, not drawn. draws: [B,C,H,W] for every index of the walk, whatever the tag."""

    draws: tuple[Tensor, ...]

    def at(self, index: int) -> StepNoise:
        """The noise of one step."""
        return lambda tag="step": self.draws[index]

    def take(self, rows: Sequence[int]) -> Recorded:
        """The noise of some of the images."""
        return Recorded(tuple(d[list(rows)] for d in self.draws))
