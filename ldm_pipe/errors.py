"""The errors a caller can expect, each one sentence and each with the exit code the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_LIST = 280  # characters of the names that a sentence lists


class LdmError(Exception):
    """Base of all errors of this package. `exit_code` is what `generate` exits with."""

    exit_code = 1


class UsageError(LdmError, ValueError):
    """The caller asked for something that cannot be: a wrong value, an unknown name, an impossible combination."""

    exit_code = 2


class ModelError(LdmError):
    """A model folder or a weight file is missing, damaged or of a kind that is not supported."""

    exit_code = 2


class EnvironmentFault(LdmError, OSError):
    """The machine refused: no space, no permission, no such device."""

    exit_code = 3


class NumericalError(LdmError, ArithmeticError):
    """A tensor stopped being finite; the message names the stage and the step."""

    exit_code = 4


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that is not known: names the nearest known one and what may be chosen.

    >>> unknown("sampler", "dim", ["ddim", "euler"])
    "'dim' is not a sampler; did you mean 'ddim'? Choose from ddim, euler"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}? Choose" if near else " choose"
    listed = ", ".join(known)
    if len(listed) > LONGEST_LIST:
        shown = listed[:LONGEST_LIST].split(", ")[:-1]
        listed = f"{', '.join(shown)} and {len(known) - len(shown)} more"
    an = "an" if kind[0] in "aeiou" else "a"
    return f"{name!r} is not {an} {kind};{hint} from {listed or 'nothing: none are registered'}"


def check_interval(what: str, lo: float, hi: float) -> None:
    """Raises UsageError where lo and hi are no interval of the noise u (`level.inside`)."""
    if not 0 <= lo <= hi <= 1:
        raise UsageError(f"{what}: it takes 0 <= lo <= hi <= 1, got {lo}, {hi}")


def finite(t: T, stage: str) -> T:
    """The tensor itself. Raises NumericalError, which names the stage, where one of its values is not finite."""
    values: Any = t
    if not bool(values.isfinite().all()):
        raise NumericalError(f"{stage} NaN or Inf; try --dtype fp32 or a lower --guidance-scale")
    return t
