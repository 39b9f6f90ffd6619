"""A rule made ready for a run: models it names are loaded, settings it does not suit refused, prompts it names found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ldm_pipe.model import Model, Rule, chain
from ldm_pipe.settings import Settings

TEXT = "text:"  # a branch whose name begins so is the condition of the prompt that follows


def ready(rule: Any, given: Settings, load: Callable[[str], Model]) -> Rule:
    """The rule and those that it wraps, each asked: `suits(settings)` raises UsageError where it is for other runs,
    `opened(load)` loads what it names."""
    if hasattr(rule, "rule"):
        rule = dataclasses.replace(rule, rule=ready(rule.rule, given, load))
    if hasattr(rule, "suits"):
        rule.suits(given)
    return rule.opened(load) if hasattr(rule, "opened") else rule


def texts(rule: Rule) -> dict[str, str]:
    """The prompts that stand in a rule as names of branches: {"text:a red hat": "a red hat"}."""
    found: dict[str, str] = {}
    for part in chain(rule):
        for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
            value = getattr(part, field.name)
            for name in value if isinstance(value, tuple) else (value,):
                if isinstance(name, str) and name.startswith(TEXT):
                    found[name] = name.removeprefix(TEXT).strip()
    return found
