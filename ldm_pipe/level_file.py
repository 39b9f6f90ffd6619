"""A list of noise levels from an untrusted text or JSON file, for the spacing `file`. What is read becomes a field of the
run, so that a recipe holds the levels themselves and never a path.

Text: numbers separated by blanks, commas or line breaks, after a unit if it is not sigma ("time: 999 850 736"); # begins a
note. JSON: a list of numbers, or an object of one such list by its unit ({"time": [999, 850, 736]}).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from ldm_pipe.errors import UsageError, unknown

UNITS = ("sigma", "time", "u")
MOST_BYTES, MOST_LEVELS = 1_000_000, 10_001


def filled_in(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spacing with `file` replaced by the values and the unit that stand in it; without `file`, unchanged."""
    rest = {n: v for n, v in fields.items() if n != "file"}
    if len(rest) == len(fields):
        return rest
    for name in ("values", "unit"):
        if name in rest:
            raise UsageError(f"--set spacing.{name} stands in the file that spacing.file names; give one of the two")
    return {**rest, **read(str(fields["file"]))}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """{"values": (numbers, ...), "unit": ...} of a file: the fields of the spacing `file`. Raises UsageError by place."""
    where = f"spacing.file {str(path)!r:.120}"
    if not os.path.isfile(path):  # a pipe or a device would be waited for
        raise UsageError(f"{where} is not a file")
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{where} cannot be read as UTF-8 text") from error
    if len(data) > MOST_BYTES:
        raise UsageError(f"{where} is larger than {MOST_BYTES // 10**6} MB")
    unit, values = _json(text, where) if text.lstrip()[:1] in ("[", "{") else _text(text, where)
    return {"values": tuple(_number(v, k, where) for k, v in enumerate(values, 1)), "unit": unit}


def _json(text: str, where: str) -> tuple[str, list[Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON") from error
    unit = "sigma"
    if isinstance(found, dict):
        if len(found) != 1:
            raise UsageError(f"{where} holds {len(found)} lists; it takes one, named {', '.join(UNITS)}")
        unit, found = next(iter(found.items()))
    return _known(unit, where), found if isinstance(found, list) else [found]


def _text(text: str, where: str) -> tuple[str, list[Any]]:
    plain = re.sub(r"#.*", "", text).strip()
    unit, colon, rest = plain.partition(":")
    numbers = (rest if colon else plain).replace(",", " ").split()
    return _known(unit.strip(), where) if colon else "sigma", numbers


def _known(unit: str, where: str) -> str:
    if unit not in UNITS:
        raise UsageError(f"{where}: " + unknown("name of a unit", unit[:40], UNITS))
    return unit


def _number(value: Any, place: int, where: str) -> float:
    if place > MOST_LEVELS:
        raise UsageError(f"{where} holds more than {MOST_LEVELS} numbers")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}: number {place} is not a finite number")
    return number
