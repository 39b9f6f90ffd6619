"""Methods as text: `pool(4)`, `blur(gaussian, 3)`, `mask(half)`, `mask(hole.png)`, `cs(ratio=4, seed=1)`, `grey`.

Values stand by position or by name, quoted where they hold a comma; nothing is evaluated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ldm_pipe import registry
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.restore.operator import Operator

PART = re.compile(r"""\s*(?:(\w+)\s*=\s*)?('[^']*'|"[^"]*"|[^,'"]+?)\s*(?:,|$)""")


def parse(text: str) -> Operator:
    """The operator that a text describes. Raises UsageError naming the nearest operator or field and what is allowed."""
    name, fields = call(text)
    return registry.build("operator", name, **fields)


def call(text: str, kind: str = "operator") -> tuple[str, dict[str, str]]:
    """The name and the fields of a text, both known, without importing any method."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if found is None:
        raise _malformed(text, kind)
    name, given = found[1], _parts((found[2] or "").strip(), text, kind)
    names = [n for n, _ in registry.entry(kind, name).fields]
    if len(given) > len(names):
        raise UsageError(f"{kind} {name} takes {len(names)} value(s) ({', '.join(names)}), got {len(given)}")
    fields: dict[str, str] = {}
    for place, (key, value) in enumerate(given):
        field = key or names[place]
        if field in fields:
            raise UsageError(f"{kind} {text[:80]!r}: {field} stands twice")
        fields[field] = value
    return name, fields


def _parts(inside: str, text: str, kind: str) -> list[tuple[str | None, str]]:
    """(name or None, value) of every value between the parentheses."""
    parts, place = [], 0
    while place < len(inside):
        found = PART.match(inside, place)
        if found is None:
            raise _malformed(text, kind)
        parts.append((found[1], found[2].strip("'\"")))
        place = found.end()
    return parts


def _malformed(text: str, kind: str) -> UsageError:
    form = "pool(4) or blur(gaussian, 3)" if kind == "operator" else "deepcache(2) or tome(ratio=0.5)"
    return UsageError(f"{kind} {text[:80]!r} is not of the form {form}")
