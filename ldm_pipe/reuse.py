"""Modules that answer with what they gave at an earlier step: what encoder propagation and feature caches are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level


@dataclass(frozen=True, eq=False)
class Reuse:
    """The state of one run. index: the step of a level. keys: the steps at which everything is computed; at the others a module
    gives what it gave last, if that was at the key step before or since, for the same branches. Elsewhere it is computed and
    kept. A level that is met again (a sampler of two evaluations, a journey back) is treated as it was the first time."""

    index: Callable[[Level], int]
    keys: tuple[int, ...]
    kept: dict[str, tuple[int, Rows, Any]] = field(default_factory=dict)

    def changes(self, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
        """The changes of modules by name."""
        return {name: self._change(name) for name in names}

    def _change(self, name: str) -> Callable[..., Any]:
        def reuse(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            rows = ROWS.get()
            now = self.index(rows.level)
            key = max((k for k in self.keys if k <= now), default=now)
            if key != now and name in self.kept:
                made, whose, value = self.kept[name]
                whole = whose.size == rows.size and not (whose.counts or rows.counts)  # else which images is not told
                if key <= made <= now and whole and set(rows.branches) <= set(whose.branches):
                    return _rows(value, whose, rows.branches)
            value = call(*args, **kwargs)
            self.kept[name] = now, rows, value
            return value

        return reuse


def _rows(value: Any, whose: Rows, branches: Sequence[str]) -> Any:
    """The rows of some branches, in their order, of a tensor or of a tuple of tensors."""
    if whose.branches == tuple(branches):
        return value
    if isinstance(value, Tensor):
        return torch.cat([value[whose.of(branch)] for branch in branches])
    return tuple(_rows(part, whose, branches) for part in value)
