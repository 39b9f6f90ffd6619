"""Configurations from anywhere: JSON of a bounded size and plausible numbers, understood whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ldm_pipe.errors import ModelError

C = TypeVar("C")
LARGEST = 10**6  # of any number in a configuration: vocabularies and sizes of images lie well below it
LONGEST_JSON, LONGEST_TOKENIZER = 4 * 2**20, 64 * 2**20  # bytes; a tokenizer's file holds its whole vocabulary


def read_json(path: Path, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path.resolve().parent.name} has no {path.name}; a model is a folder in diffusers' layout")
    if path.stat().st_size > longest:
        raise ModelError(f"{path.parent.name}/{path.name} is longer than {longest} bytes; no configuration is")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read as JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.parent.name}/{path.name} holds {type(found).__name__}, not an object")
    return found


def plausible(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError where a configuration holds a number that no model has, however deep: too large, or not finite."""
    for name, value in config.items():
        rest = [value]
        while rest:
            item = rest.pop()
            if isinstance(item, list | dict):
                rest += item.values() if isinstance(item, dict) else item
            elif isinstance(item, int | float) and not -LARGEST <= item <= LARGEST:
                raise ModelError(f"{where}: {name} holds {item!r:.40}, which no model has")


def known(cls: type[C], config: Mapping[str, Any]) -> C | None:
    """The dataclass `cls` of a configuration, or None where it asks for anything that `cls` does not know.

    Every name must be a field of the right type or one of `cls.neutral` with a value listed there; names that begin with an
    underscore say who wrote the file. A ValueError of `cls` means None too: fields that do not fit each other.
    """
    hints = typing.get_type_hints(cls)
    neutral: Mapping[str, tuple[Any, ...]] = cls.neutral  # type: ignore[attr-defined]
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in fields and _fits(value, hints[name]):
            values[name] = value
        elif not name.startswith("_") and not any(_same(value, v) for v in neutral.get(name, ())):
            return None
    try:
        return cls(**values)
    except (ValueError, ArithmeticError):
        return None


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return any(_same(value, a) for a in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, int | float if hint is float else hint)


def _same(value: Any, one: Any) -> bool:
    return value == one and isinstance(value, bool) == isinstance(one, bool)
