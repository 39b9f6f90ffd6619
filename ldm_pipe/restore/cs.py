"""Compressed sensing: A is a seeded choice of rows of the Walsh-Hadamard transform."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Spectrum


@dataclass(frozen=True)
class CS(Linear):
    """One of every `ratio` coefficients of the Walsh-Hadamard transform of each channel: [B,C,H,W] -> [B,C,H,W/ratio].

    The rows are drawn by `seed`, the same for all channels; the H * W / ratio numbers of a channel are laid out as H rows, so
    that the image's shape can be told from them. Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793,
    appendix. Raises UsageError where H * W is no power of two or W no multiple of the ratio.
    """

    ratio: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ratio < 1 or not 0 <= self.seed < 2**64:
            raise UsageError(f"cs takes a ratio of 1 or more and a seed of 0 or more, got {self.ratio} and {self.seed}")

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Rows times the ratio."""
        return shape[0], shape[1], shape[2] * self.ratio

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Coefficients [B,C,H*W], in natural order; singular values 1 and 0."""
        height, width = shape[1:]
        count = height * width
        if count & (count - 1) or width % self.ratio:
            raise UsageError(
                f"cs({self.ratio}) takes images of 2^n pixels and a width that is a multiple of {self.ratio}, "
                f"got {width}x{height}"
            )
        rows = _rows(self.seed, count, count // self.ratio).to(like.device)
        s = like.new_zeros(count)
        s[rows] = 1
        return Spectrum(
            s,
            lambda c: c[..., rows].reshape(*c.shape[:-1], height, -1),
            lambda y: torch.zeros_like(s).expand(*y.shape[:2], -1).index_copy(-1, rows, y.flatten(-2)),
            lambda c: _hadamard(c).reshape(*c.shape[:-1], height, width),
            lambda x: _hadamard(x.flatten(-2)),
        )


@functools.lru_cache(8)
def _rows(seed: int, count: int, kept: int) -> Tensor:
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)[:kept]
    return torch.from_numpy(np.sort(order))


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, its own inverse, in n log n."""
    n, half = x.shape[-1], 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2).flatten(-3)
        half *= 2
    return x / n**0.5
