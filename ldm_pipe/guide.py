"""Guidance as text: `cfg(5) | rescale(0.7) | between(0.2, 0.9)` is Between(0.2, 0.9, Rescale(0.7, CFG(5))).

Each part wraps the one before it as its `rule`; guides, which correct the estimate of all rules, stand last. Values are
literals by position or by name; nothing is evaluated.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from ldm_pipe import registry
from ldm_pipe.calls import by_field, read
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.model import Rule


def parse(text: str) -> Rule:
    """The rule that a text describes. Raises UsageError naming the part, the nearest rule or field, and what is allowed."""
    rule = None
    for kind, name, fields in calls(text):
        if kind == "guide":
            continue
        if rule is not None and "rule" not in dict(registry.entry("rule", name).fields):
            raise UsageError(f"--guide {text!r}: {name} wraps no other rule; put it first")
        try:
            rule = registry.build("rule", name, **fields, **({} if rule is None else {"rule": rule}))
        except UsageError as error:
            raise UsageError(f"--guide: {error}") from error
    return registry.build("rule", "cfg", scale=1.0) if rule is None else rule  # type: ignore[no-any-return]


def guides(text: str) -> tuple[Any, ...]:
    """The guides that a text describes, the first one innermost. Raises UsageError as `parse` does."""
    try:
        return tuple(registry.build(kind, name, **fields) for kind, name, fields in calls(text) if kind == "guide")
    except UsageError as error:
        raise UsageError(f"--guide: {error}") from error


def calls(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The parts of a text as (kind, name, fields), names and fields known, without importing any rule."""
    found = [_call(part.strip(), text) for part in text.split("|")]
    kinds = [kind for kind, _, _ in found]
    if sorted(kinds, reverse=True) != kinds:
        raise UsageError(f"--guide {text[:80]!r}: {found[kinds.index('guide')][1]} is no rule that others wrap; put it last")
    return found


def _call(part: str, text: str) -> tuple[str, str, dict[str, Any]]:
    found = read(part)
    if found is None:
        plain = "; for a scale alone there is --guidance-scale" if re.fullmatch(r"[-+.\d]+", part) else ""
        raise UsageError(f"--guide {text[:80]!r} is not of the form cfg(5) | between(0.2, 0.9){plain}")
    name, given = found
    kind = "guide" if name in registry.KINDS["guide"] else "rule"
    names = [n for n, _ in registry.entry(kind, name).fields if n != "rule"]
    fields = by_field(name, given, names, "--guide:")
    return kind, name, {field: _literal(value, name, field) for field, value in fields.items()}


def _literal(value: str, name: str, field: str) -> Any:
    if value.partition("(")[0] in registry.KINDS["rule"]:
        raise UsageError(f"--guide: a rule cannot stand inside another; write {value[:40]} | {name}(...)")
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UsageError(f"--guide: {field} of {name} is not a number or a quoted text") from error
