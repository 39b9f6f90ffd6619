"""`--patch "deepcache(2)" --patch tome`: what changes the network for a run, from text, and the plan that runs under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm_pipe import calls, registry
from ldm_pipe.errors import UsageError, unknown

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

# What --speed stands for. What each costs and gains on the built-in model: scripts/bench/tradeoff.py.
SPEED: dict[str, tuple[str, ...]] = {
    "exact": ("text_cache",),
    "balanced": ("text_cache", "deepcache(2)"),
    "fast": ("text_cache", "deepcache(3)", "tome(0.5)"),
}


@dataclass(frozen=True)
class Patches:
    """texts: patches such as "deepcache(2)", the first one innermost. speed: the preset that some of them are from. Raises
    UsageError on unknown names and fields."""

    texts: tuple[str, ...] = ()
    speed: str = ""

    def __post_init__(self) -> None:
        for text in self.texts:
            name, fields = calls.fields(text, "patch")
            for field, default in registry.entry("patch", name).fields:
                if default == "required" and field not in fields:
                    raise UsageError(f"--patch {name} needs {field}, which is no text; use --control, or Python")

    @classmethod
    def of(cls, speed: str | None, texts: Sequence[str]) -> Patches:
        """The patches of a preset, then those of --patch."""
        if speed is not None and speed not in SPEED:
            raise UsageError("--speed " + unknown("preset", speed, SPEED))
        return cls((*SPEED.get(speed or "", ()), *texts), speed or "")

    def applied(self, pipe: Pipeline, whole: Plan) -> Plan:
        """The plan whose every evaluation runs under the patches. Raises UsageError where the network does not suit them."""
        if not self.texts:
            return whole
        from ldm_pipe.plan import patched

        named = [calls.fields(text, "patch") for text in self.texts]
        found = [registry.build("patch", name, **fields) for name, fields in named]
        recorded = {**whole.recorded, "patches": self.texts, "speed": self.speed}
        return replace(patched(whole, pipe.bundle.model, found), recorded=recorded)
