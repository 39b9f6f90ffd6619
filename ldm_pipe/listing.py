"""`generate --list`: what there is, read from the source and from the built-in model's file; nothing is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm_pipe import registry
from ldm_pipe.errors import ModelError, UsageError, unknown

PLURALS = {f"{kind}{'es' if kind.endswith('ch') else 's'}": kind for kind in registry.KINDS}


def show(kind: str) -> int:
    """Print what there is of a kind, "words" or "all"; the exit code. Raises UsageError on an unknown kind."""
    if kind == "words":
        print("\n".join(_builtin()["words"]))
        return 0
    if kind not in ("all", *PLURALS):
        raise UsageError("--list " + unknown("kind", kind, ["all", "words", *PLURALS]))
    for plural in PLURALS if kind == "all" else (kind,):
        print(f"{plural}:")
        found = registry.entries(PLURALS[plural])
        wide = max(len(entry.name) for entry in found)
        for entry in found:
            fields = ", ".join(f"{n}={d}" for n, d in entry.fields if "(" not in d)  # not the wrapped rule
            print(f"  {entry.name:<{wide}} {entry.summary}" + (f"\n{'':{wide + 3}}{fields}" if fields else ""))
    return 0


def defaults() -> str:
    """The built-in model's defaults, for the help."""
    d = _builtin()
    width, height = d["size"]
    return f"builtin: {d['steps']} steps, scale {d['guidance_scale']}, {d['sampler']}, {d['spacing']}, {width}x{height} pixels"


def _builtin() -> dict[str, Any]:
    path = Path(__file__).resolve().parent / "builtin" / "ldm_pipe.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"builtin/ldm_pipe.json cannot be read: {type(error).__name__}") from error
