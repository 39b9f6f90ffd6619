"""What an editing method is given and gives back: sources and targets that are drawn side by side in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from ldm_pipe.attention import AttentionRule, InputRule
from ldm_pipe.cond import Cond, Rows
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import CondAt, Denoiser
from ldm_pipe.patch import Attending
from ldm_pipe.walk import Sampler

Guide = Callable[[Denoiser], Denoiser]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The part of a run that an editing method may look at and change.

    source, target: the prompts. rows: (row of the source, row of its target) in the batch, for every pair. network: where
    attention rules and taps are let in. text: the text encoder, with its `tokenizer` and `window`. levels, sampler: of the
    walk. guides: what corrects the guided estimate, the first one innermost. conds: conditions of the whole batch that take
    the place of the usual ones, by branch. mask: [1,1,H,W] in 0..1 on pixels, 1 = to be edited; None where none was given.
    negative: the prompt of the usual "uncond".
    """

    source: str
    target: str
    rows: tuple[tuple[int, int], ...]
    network: nn.Module
    text: Any
    levels: Sequence[Level]
    sampler: Sampler
    guides: tuple[Guide, ...] = ()
    conds: Mapping[str, Cond | CondAt] = field(default_factory=dict)
    mask: Tensor | None = None
    negative: str = ""

    def attending(self, rule: AttentionRule | InputRule) -> Pairs:
        """The same with a rule in the network's attention."""
        return replace(self, guides=(*self.guides, Attending(self.network, rule)))

    def until(self, share: float) -> float:
        """The noise u above which the first `share` (0..1) of the walk's steps lie."""
        return until(self.levels, share)


class Editing(Protocol):
    """A registered editing method: its fields are what a user may set, all with defaults."""

    def __call__(self, pairs: Pairs) -> Pairs:
        """The run with the method in it: more guides, a sampler around the sampler, other conditions."""


def sides(rows: Rows, branch: str, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]] | None:
    """The rows of the sources and of the targets among those of a branch in a batched call; None where it is not in the call.

    Raises UsageError where a pair reaches beyond the batch.
    """
    own = rows.of(branch)
    if own is None or not pairs:
        return None
    if max(max(pair) for pair in pairs) >= rows.size:
        raise UsageError(f"an edit needs its pictures in one batch, and this one holds {rows.size}")
    return [own.start + s for s, _ in pairs], [own.start + t for _, t in pairs]


def until(levels: Sequence[Level], share: float) -> float:
    """The noise u above which the first `share` (0..1) of a walk's steps lie."""
    return float(levels[round(share * (len(levels) - 1))].u)


def spliced(whole: Tensor, alone: Tensor, where: Sequence[tuple[int, range]]) -> Tensor:
    """Tokens [B,L,...] of a prompt with those of another in some places: (the other's first token, places in the prompt)."""
    mixed = whole.clone()
    for first, span in where:
        mixed[:, span.start : span.stop] = alone[:, first : first + len(span)]
    return mixed
