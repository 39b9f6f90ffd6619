"""What an image is conditioned on, as tensors whose first axis is the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level


class Rows(NamedTuple):
    """What the rows of a batched network call are: `size` images under every branch, in the branches' order, at a level.

    counts: how many images each branch holds, where some hold fewer.
    """

    branches: tuple[str, ...]
    size: int
    level: Level
    counts: tuple[int, ...] = ()

    def of(self, branch: str) -> slice | None:
        """The rows of one branch, None where the call does not hold it."""
        if branch not in self.branches:
            return None
        place, counts = self.branches.index(branch), self.counts or (self.size,) * len(self.branches)
        first = sum(counts[:place])
        return slice(first, first + counts[place])


# Of the call that runs in this thread; what looks into a network (attention rules, feature taps) reads it there.
_NO_CALL = Rows((), 0, CLEAN)
ROWS: ContextVar[Rows] = ContextVar("ROWS", default=_NO_CALL)


@dataclass(frozen=True, eq=False)
class Cond:
    """A batch of conditions. Every tensor has B rows; what a network does not use is None.

    tokens: [B,L,D] text features for cross-attention. pooled: [B,D] one vector per prompt. mask: [B,L] True = a token that
    counts. channels: [B,C,H,W] joined to x on the channel axis. extras: anything else, by the name the network knows.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def map(self, f: Callable[[Tensor], Tensor]) -> Cond:
        """The same condition with `f` applied to every tensor."""
        parts = {n: f(t) for n, t in self._tensors().items()}
        return replace(self, **parts, extras={n: f(t) for n, t in self.extras.items()})

    def _tensors(self) -> dict[str, Tensor]:
        named = {"tokens": self.tokens, "pooled": self.pooled, "mask": self.mask, "channels": self.channels}
        return {n: t for n, t in named.items() if t is not None}

    @property
    def rows(self) -> int:
        """How many conditions the batch holds."""
        return next((len(t) for t in (*self._tensors().values(), *self.extras.values())), 0)

    def repeat(self, times: int) -> Cond:
        """Each row `times` times, in place: rows a, b become a, a, b, b."""
        return self.map(lambda t: t.repeat_interleave(times, 0))

    def take(self, rows: Sequence[int] | slice) -> Cond:
        """Some of the rows."""
        return self.map(lambda t: t[rows if isinstance(rows, slice) else list(rows)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """On a device and, for floating point tensors, in a dtype."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """One batch of several. Raises UsageError where they do not hold the same tensors or differ in length."""
        first = conds[0]
        if len(conds) == 1:
            return first
        names, extras = set(first._tensors()), set(first.extras)
        if any(set(c._tensors()) != names or set(c.extras) != extras for c in conds):
            raise UsageError("conditions that hold different tensors cannot share a batch")
        try:
            parts = {n: torch.cat([c._tensors()[n] for c in conds]) for n in names}
            return Cond(**parts, extras={n: torch.cat([c.extras[n] for c in conds]) for n in extras})
        except RuntimeError as error:
            raise UsageError(f"conditions of different shapes cannot share a batch: {error}") from error
