"""What a walk does to a distribution, exactly: under a denoiser that is affine in x (a `Gaussian`'s), a linear sampler maps
x to F x + f + G z, and F, f and G are read off by feeding it unit vectors as x and as noise. No Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, sample, trajectory

Moments = tuple[Tensor, Tensor]
Draw = tuple[int, str]


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> matrix x + offset + N(0, covariance). matrix: [D,D], offset: [D], covariance: [D,D], float64."""

    matrix: Tensor
    offset: Tensor
    covariance: Tensor

    def then(self, later: Affine) -> Affine:
        """This map, and then another with noise of its own."""
        f = later.matrix
        return Affine(f @ self.matrix, f @ self.offset + later.offset, f @ self.covariance @ f.T + later.covariance)

    def carry(self, mean: Tensor, covariance: Tensor) -> Moments:
        """Mean [D] and covariance [D,D] after the map."""
        return self.matrix @ mean + self.offset, self.matrix @ covariance @ self.matrix.T + self.covariance


def read_walk(
    denoise: Denoiser, levels: Sequence[Level], sampler: Sampler, shape: tuple[int, ...], within: float = 1e-9
) -> Affine:
    """The map of a whole walk over images of `shape` (D = their number of values), with all of its noise.

    The walk is read in pieces that end where the sampler remembers nothing: step by step for most samplers. A sampler with
    memory is read over its whole walk, with D rows for every draw of noise in it. Raises UsageError where the walk is not
    affine: one image of arbitrary values, walked on its own, must go where the unit vectors foretell, to `within` of the
    largest value.
    """
    dim = math.prod(shape)
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    whole = Affine(eye, zero, torch.zeros_like(eye))
    for piece in _pieces(denoise, levels, sampler, shape):
        whole = whole.then(_read(denoise, piece, sampler, shape, within))
    return whole


def outcome(denoise: Denoiser, levels: Sequence[Level], sampler: Sampler, shape: tuple[int, ...]) -> Moments:
    """Mean [D] and covariance [D,D] of what a sampler makes of its own start, from standard normal noise of `shape`.

    Raises UsageError where the walk is not affine; the start is taken to be.
    """
    dim = math.prod(shape)
    eye = torch.eye(dim, dtype=torch.float64)
    rows = sampler.start(torch.cat([torch.zeros_like(eye[:1]), eye]).reshape(-1, *shape), levels[0]).reshape(-1, dim)
    matrix = (rows[1:] - rows[0]).T
    return read_walk(denoise, levels, sampler, shape).carry(rows[0], matrix @ matrix.T)


class _Piece(NamedTuple):
    """A part of a walk: its levels, the draws in it with the values they were given, x [D] before and after."""

    levels: Sequence[Level]
    draws: dict[Draw, Tensor]
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class _Listener:
    """A source that notes which draws are asked for and answers with arbitrary values."""

    shape: tuple[int, ...]
    heard: dict[Draw, Tensor] = field(default_factory=dict)

    def at(self, index: int) -> StepNoise:
        def draw(tag: str = "step") -> Tensor:
            return self.heard.setdefault((index, tag), self.values(1 + 7 * index + len(self.heard)))

        return draw

    def values(self, number: int) -> Tensor:
        return 2.5 * torch.arange(math.prod(self.shape)).double().add(0.37 * number).mul(2.4).cos().reshape(1, *self.shape)


@dataclass(frozen=True)
class _Units:
    """A row of zeros, every unit vector as x, and every unit vector as each draw, in that order."""

    shape: tuple[int, ...]
    draws: Sequence[Draw]

    def at(self, index: int) -> StepNoise:
        def draw(tag: str = "step") -> Tensor:
            if (index, tag) not in self.draws:
                raise UsageError(f"the walk is not affine: whether it draws {tag!r} depends on x")
            return self.rows(1 + self.draws.index((index, tag)))

        return draw

    def rows(self, block: int) -> Tensor:
        d = math.prod(self.shape)
        rows = torch.zeros(1 + (1 + len(self.draws)) * d, d, dtype=torch.float64)
        rows[1 + block * d : 1 + (block + 1) * d] = torch.eye(d, dtype=torch.float64)
        return rows.reshape(-1, *self.shape)


def _pieces(denoise: Denoiser, levels: Sequence[Level], sampler: Sampler, shape: tuple[int, ...]) -> Iterator[_Piece]:
    """The walk of one image of arbitrary values, cut where the sampler remembers nothing; draws are indexed from the cut."""
    first, listener = 0, _Listener(shape)
    before = x = listener.values(0)
    for done in trajectory(denoise, x, levels, sampler, listener):
        last = done.number + 1
        if done.memory is None or last == len(levels) - 1:
            draws = {(index - first, tag): value.flatten() for (index, tag), value in listener.heard.items()}
            yield _Piece(levels[first : last + 1], draws, before.flatten(), done.x.flatten())
            first, before = last, done.x
            listener.heard.clear()


def _read(denoise: Denoiser, piece: _Piece, sampler: Sampler, shape: tuple[int, ...], within: float) -> Affine:
    units, d = _Units(shape, list(piece.draws)), math.prod(shape)
    rows = sample(denoise, units.rows(0), piece.levels, sampler, units).reshape(-1, d)
    columns = (rows[1:] - rows[0]).T  # F and then G
    gap = float((rows[0] + columns @ torch.cat([piece.before, *piece.draws.values()]) - piece.after).abs().max())
    if not gap <= within * max(1.0, float(rows.abs().max()), float(piece.after.abs().max())):
        raise UsageError(f"the walk from {piece.levels[0]} to {piece.levels[-1]} is not affine: off by {gap:.2g}")
    return Affine(columns[:, :d], rows[0], columns[:, d:] @ columns[:, d:].T)
