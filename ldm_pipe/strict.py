"""Dataclasses from untrusted mappings (TOML, `--set`): no unknown field, no wrong type, the nearest name offered."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ldm_pipe.errors import UsageError, unknown

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `cls` from a mapping. `where` names the source in errors ("sampler ddim", "recipe.toml").

    Integers are taken where floats are asked for, strings such as "0.5" or "true" are read as the field's type (they
    come from the command line), lists become tuples. Raises UsageError on anything else.
    """
    where = where or cls.__name__
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise UsageError(unknown(f"field of {where}", name, fields))
    missing = [n for n, f in fields.items() if _required(f) and n not in values]
    if missing:
        raise UsageError(f"{where} needs {', '.join(missing)}")
    return cls(**{n: coerce(v, hints[n], f"{where}: {n}") for n, v in values.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or UsageError naming `where` and what is allowed."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, args, where)
    if origin is typing.Literal:
        if value in args:
            return value
        raise UsageError(f"{where} is {value!r}; choose from {', '.join(map(str, args))}")
    if origin is dict:
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return dict(value)
        raise UsageError(f"{where} takes a table, got {value!r:.60}")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} takes a list, got {value!r}")
        kinds = args[:1] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(kinds) != len(value):
            raise UsageError(f"{where} takes {len(kinds)} values, got {len(value)}")
        return tuple(coerce(v, k, where) for v, k in zip(value, kinds, strict=True))
    return _scalar(value, hint, where)


def _first_that_fits(value: Any, options: tuple[Any, ...], where: str) -> Any:
    empty = value is None or (isinstance(value, str) and value.lower() == "none")
    if empty and type(None) in options:
        return None
    wanted = [o for o in options if o is not type(None)]
    for option in wanted[:-1]:
        try:
            return coerce(value, option, where)
        except UsageError:
            continue
    return coerce(value, wanted[-1], where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    text = isinstance(value, str)
    if hint is bool:
        if isinstance(value, bool):
            return value
        if text and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint in (int, float) and not isinstance(value, bool):
        try:
            number = hint(value) if text or hint is float else value
        except (TypeError, ValueError, OverflowError):
            number = None
        if isinstance(number, hint) and (hint is int or math.isfinite(number)):
            return number
    elif hint is Any or (hint is str and text) or _is_ready(value, hint):
        return value
    raise UsageError(f"{where} is {value!r}; it takes {_says(hint)}")


def _is_ready(value: Any, hint: Any) -> bool:
    """Is this an object that comes ready made (a Rule, a Sampler), where one is wanted?"""
    if not isinstance(hint, type) or hint in (bool, int, float, str):
        return False
    if getattr(hint, "_is_protocol", False):
        asked = (n for n in vars(hint) if n == "__call__" or not n.startswith("_"))
        return dataclasses.is_dataclass(value) and all(hasattr(value, n) for n in asked)
    return isinstance(value, hint)


def _says(hint: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
