"""Token Merging for Fast Stable Diffusion, Bolya and Hoffman 2023, arXiv 2303.17604, section 4; ToMe, arXiv 2210.09461.

Before a self-attention, the positions that are most alike become one; after it, each takes back what its one was given. One
position of every 2x2 square takes others in, the rest are given to the most similar of those, the most similar first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, noting_size


@dataclass(frozen=True)
class ToMe(Patch):
    """Merge the positions that are most alike before self-attention.

    ratio: the share that goes, 0 to 0.75. deepest: merge where the image is up to this many times smaller than x (1: at the
    full size alone, where attention costs most).
    """

    ratio: float = 0.5
    deepest: int = 1
    neutral: ClassVar[Mapping[str, Any]] = {"ratio": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 0.75 or self.deepest < 1:
            raise UsageError(f"tome takes a ratio from 0 to 0.75 and deepest from 1, got {self.ratio} and {self.deepest}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around every self-attention, and one around the network, which tells the size of x."""
        names = [n for n, _ in network.named_modules() if n.endswith("attn1")]
        if not names:
            raise UsageError(f"tome needs self-attention; {type(network).__name__} has no layer attn1")
        size: list[int] = []

        def merged(call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            (height, width), times = size, 1
            while height * width > x.shape[1]:
                height, width, times = -(-height // 2), -(-width // 2), 2 * times
            if times > self.deepest or height * width != x.shape[1] or int(self.ratio * x.shape[1]) == 0:
                return call(x, *args, **kwargs)
            merge = Merge.of(x, height, width, self.ratio, run.index(ROWS.get().level))
            return merge.undo(call(merge(x), *args, **kwargs))

        return dict.fromkeys(names, merged) | {"": noting_size(size)}


@dataclass(frozen=True, eq=False)
class Merge:
    """Which positions stay alone, which take others in, and where the others go. takers [T], keep [B,K], gone [B,R]: places
    among L positions; into [B,R]: which taker each goes to."""

    takers: Tensor
    keep: Tensor
    gone: Tensor
    into: Tensor

    @classmethod
    def of(cls, x: Tensor, height: int, width: int, ratio: float, step: int) -> Merge:
        """From features x [B,L,C] of an image of height * width positions. step: draws which of each square takes."""
        takers = _takers(height, width, step).to(x.device)
        others = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        others[takers] = False
        rest = others.nonzero()[:, 0]
        unit = F.normalize(x.float(), dim=-1)
        likeness, nearest = (unit[:, rest] @ unit[:, takers].mT).max(-1)
        order = likeness.argsort(dim=-1, descending=True, stable=True)
        count = min(int(ratio * x.shape[1]), len(rest))
        gone, keep = order[:, :count], order[:, count:]
        return cls(takers, rest[keep], rest[gone], nearest.gather(1, gone))

    def __call__(self, x: Tensor) -> Tensor:
        """[B,L,C] -> [B,K+T,C]: those that stay alone, then the takers, each the mean of itself and what it takes in."""
        into = self.into[..., None].expand(-1, -1, x.shape[-1])
        taken = x[:, self.takers].scatter_reduce(1, into, _pick(x, self.gone), "mean")
        return torch.cat([_pick(x, self.keep), taken], dim=1)

    def undo(self, y: Tensor) -> Tensor:
        """[B,K+T,C] -> [B,L,C]: every position has what its one was given."""
        keep, takers = y[:, : self.keep.shape[1]], y[:, self.keep.shape[1] :]
        out = y.new_empty(len(y), self.keep.shape[1] + len(self.takers) + self.gone.shape[1], y.shape[2])
        out[:, self.takers] = takers
        out.scatter_(1, self.keep[..., None].expand_as(keep), keep)
        given = _pick(takers, self.into)
        return out.scatter_(1, self.gone[..., None].expand_as(given), given)


def _pick(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _takers(height: int, width: int, step: int) -> Tensor:
    """One place of every whole 2x2 square, the same for all images of a step; an odd row or column takes none."""
    rows, columns = height // 2, width // 2
    drawn = np.random.Generator(np.random.Philox(key=step)).integers(0, 4, (rows, columns))
    y, x = 2 * np.arange(rows)[:, None] + drawn // 2, 2 * np.arange(columns) + drawn % 2
    return torch.from_numpy((y * width + x).ravel())
