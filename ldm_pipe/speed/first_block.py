"""First Block Cache for diffusion transformers: ParaAttention, Cheng 2025, https://github.com/chengzeyi/ParaAttention.

What TeaCache measures at the input of a transformer (Timestep Embedding Tells: It's Time to Cache, Liu et al. 2024, arXiv
2411.19108, eq. 4) is measured at its first block: where that adds nearly what it added when all blocks last ran, the others are
taken to add what they added then. The memory is of images, so that one goes on while another waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_pipe.ahead import each
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run


@dataclass(frozen=True)
class FirstBlock(Patch):
    """Run all blocks of a transformer only where the first one tells that something has changed.

    threshold: relative change, in the mean of the absolute values, from which all run; 0 = always, .05 to .15 are usual. An
    image's branches run together.
    """

    threshold: float = 0.1
    neutral: ClassVar[Mapping[str, Any]] = {"threshold": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 10:
            raise UsageError(f"first_block: threshold takes 0 to 10, got {self.threshold}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Changes around the first, the inner and the last blocks."""
        names, memory = _blocks(network), _Memory(self.threshold)
        return {names[0]: memory.first, **dict.fromkeys(names[1:-1], memory.inner), names[-1]: memory.last}


@dataclass(frozen=True, eq=False)
class _Memory:
    """Of one run. kept: by branch, what the first block added and what the others added, when all ran; [B,L,C] each. now: of
    this call, what the first block gave and added, and the rows that go through all blocks, None = every one."""

    threshold: float
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)

    def first(self, call: Callable[..., Any], h: Tensor, *args: Any, **given: Any) -> Tensor:
        """Runs, and decides for the others."""
        begun: Tensor = call(h, *args, **given)
        self.now.update(begun=begun, added=begun - h, todo=self._changed(begun - h, ROWS.get()))
        return begun

    def _changed(self, added: Tensor, rows: Rows) -> Tensor | None:
        known = (
            rows.branches
            and not rows.counts
            and all(b in self.kept and self.kept[b][0].shape == added[rows.of(b)].shape for b in rows.branches)
        )
        if self.threshold == 0 or not known:
            return None
        before = torch.cat([self.kept[b][0] for b in rows.branches])
        change = (added - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)
        images = (change > self.threshold).reshape(len(rows.branches), rows.size).any(0)
        return images.repeat(len(rows.branches)).nonzero()[:, 0]

    def inner(self, call: Callable[..., Any], h: Tensor, *args: Any, **given: Any) -> Tensor:
        """Runs for the rows that go through all blocks."""
        todo, count = self.now["todo"], len(h)
        if todo is None or len(todo) == count:
            return call(h, *args, **given)
        if len(todo) == 0:
            return h
        args, given = each((args, given), lambda t: t[todo] if len(t) == count else t)
        return h.index_copy(0, todo, call(h[todo], *args, **given))

    def last(self, call: Callable[..., Any], h: Tensor, *args: Any, **given: Any) -> Tensor:
        """Runs likewise; the other rows get what the blocks added when they last ran."""
        rows, out = ROWS.get(), self.inner(call, h, *args, **given)
        begun, added, todo = (self.now.pop(n) for n in ("begun", "added", "todo"))
        rest = out - begun
        if todo is not None and len(todo) < len(h):
            before, then = (torch.cat([self.kept[b][k] for b in rows.branches]) for k in (0, 1))
            added, rest = (old.index_copy(0, todo, new[todo]) for old, new in ((before, added), (then, rest)))
            out = (begun + then).index_copy(0, todo, out[todo])
        for b in rows.branches:
            if rows.counts:
                self.kept.pop(b, None)  # which images these rows are is not told
            else:
                self.kept[b] = added[rows.of(b)], rest[rows.of(b)]
        return out


def _blocks(network: Any) -> list[str]:
    found = [(n, m) for n, m in network.named_modules() if n.rpartition(".")[2] == "transformer_blocks"]
    if len(found) != 1 or len(found[0][1]) < 2 or hasattr(found[0][1][0], "norm1_context"):
        raise UsageError(
            f"first_block needs a transformer whose blocks hand on one tensor, such as PixArt, DiT or Sana; "
            f"{type(network).__name__} is none"
        )
    return [f"{found[0][0]}.{i}" for i in range(len(found[0][1]))]
