"""`name(values)` as text, what rules, patches and operators are given as: `cfg(5)`, `tome(ratio=0.5)`, `mask(hole.png)`.

Values stand by position or by name, quoted where they hold a comma; nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ldm_pipe import registry
from ldm_pipe.errors import UsageError

CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)
INSIDE = r"[(\[](?:[^()\[\]]|[(\[][^()\[\]]*[)\]])*[)\]]"  # brackets in a value, which may hold others
PART = re.compile(rf"""\s*(?:(\w+)\s*=\s*)?((?:'[^']*'|"[^"]*"|{INSIDE}|[^,'"()\[\]])+)(?:,|$)""", re.DOTALL)


def read(text: str) -> tuple[str, list[tuple[str | None, str]]] | None:
    """(name, its values as they stand, each with the name of its field or None); None where the text is not of the form."""
    found = CALL.fullmatch(text)
    if found is None:
        return None
    inside, place = (found[2] or "").strip(), 0
    parts: list[tuple[str | None, str]] = []
    while place < len(inside):
        part = PART.match(inside, place)
        if part is None or not part[2].strip():
            return None
        parts.append((part[1], part[2].strip()))
        place = part.end()
    return found[1], parts


def by_field(name: str, given: Sequence[tuple[str | None, str]], names: Sequence[str], what: str) -> dict[str, str]:
    """The values by their fields. names: of the fields by position; what: begins what is said. Raises UsageError on more values
    than fields, and on a field that stands twice."""
    if len(given) > len(names):
        raise UsageError(f"{what} {name} takes {len(names)} value(s) ({', '.join(names)}), got {len(given)}")
    fields = [key or names[place] for place, (key, _) in enumerate(given)]
    twice = next((field for field in fields if fields.count(field) > 1), None)
    if twice is not None:
        raise UsageError(f"{what} {name}: {twice} stands twice")
    return dict(zip(fields, (value for _, value in given), strict=True))


def fields(text: str, kind: str) -> tuple[str, dict[str, str]]:
    """The name and the fields of an operator or a patch, the name known, without importing any. Values are texts."""
    found = read(text)
    if found is None or any(set("'\"") & set(value[1:-1] if value[0] in "'\"" else value) for _, value in found[1]):
        form = "pool(4) or blur(gaussian, 3)" if kind == "operator" else "deepcache(2) or tome(ratio=0.5)"
        raise UsageError(f"{kind} {text[:80]!r} is not of the form {form}")
    name, given = found
    known = [n for n, _ in registry.entry(kind, name).fields]
    return name, {field: value.strip("'\"") for field, value in by_field(name, given, known, kind).items()}
