"""Operators as text: `pool(4)`, `blur(gaussian, 3)`, `mask(half)`, `mask(hole.png)`, `cs(ratio=4, seed=1)`, `grey`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ldm_pipe import registry
from ldm_pipe.calls import fields

if TYPE_CHECKING:
    from ldm_pipe.restore.operator import Operator


def parse(text: str) -> Operator:
    """The operator that a text describes. Raises UsageError naming the nearest operator or field and what is allowed."""
    name, given = fields(text, "operator")
    return registry.build("operator", name, **given)
