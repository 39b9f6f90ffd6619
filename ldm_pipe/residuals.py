"""What several ControlNets of a transformer give behind its blocks, added up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldm_pipe.errors import UsageError


def added(method: str, blocks: Sequence[Tensor] | None, before: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """`blocks` on top of what the networks before gave; None gives nothing. Raises UsageError, which names the method, where
    their numbers differ."""
    if blocks is None or before is None:
        return before if blocks is None else blocks
    if len(blocks) != len(before):
        raise UsageError(f"{method}: networks of {len(before)} and {len(blocks)} blocks do not add up")
    return [a + b for a, b in zip(blocks, before, strict=True)]
