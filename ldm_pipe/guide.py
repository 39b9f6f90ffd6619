"""Guidance as text: `cfg(5) | rescale(0.7) | between(0.2, 0.9)` is Between(0.2, 0.9, Rescale(0.7, CFG(5))).

Each part wraps the one before it as its `rule`; guides, which correct the estimate of all rules, stand last. Values are
literals by position or by name; nothing is evaluated.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from ldm_pipe import registry
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
    try:
        node = ast.parse(part, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"--guide {text[:80]!r} is not of the form cfg(5) | between(0.2, 0.9)") from error
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        plain = "; for a scale alone there is --guidance-scale" if isinstance(node, ast.Constant) else ""
        raise UsageError(f"--guide {text[:80]!r} is not of the form cfg(5) | between(0.2, 0.9){plain}")
    name = node.func.id
    kind = "guide" if name in registry.KINDS["guide"] else "rule"
    names = [n for n, _ in registry.entry(kind, name).fields if n != "rule"]
    if len(node.args) > len(names):
        raise UsageError(f"--guide: {name} takes {len(names)} value(s) ({', '.join(names)}), got {len(node.args)}")
    given = [*zip(names, node.args, strict=False), *((k.arg, k.value) for k in node.keywords)]
    fields = [field for field, _ in given]
    if len(set(fields)) < len(fields):
        raise UsageError(f"--guide: a field of {name} stands twice in {text[:80]!r}")
    return kind, name, {str(field): _literal(value, name, str(field)) for field, value in given}


def _literal(node: ast.expr, name: str, field: str) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) in registry.KINDS["rule"]:
        raise UsageError(f"--guide: a rule cannot stand inside another; write {ast.unparse(node)[:40]} | {name}(...)")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--guide: {field} of {name} is not a number or a quoted text") from error
