"""Errors are one sentence with an exit code, and are also the built-in kinds that callers may catch."""

from __future__ import annotations

import doctest

import pytest

from ldm_pipe import EnvironmentFault, LdmError, ModelError, NumericalError, UsageError, errors


@pytest.mark.parametrize(
    ("kind", "code", "also"),
    [
        (UsageError, 2, ValueError),
        (ModelError, 2, Exception),
        (EnvironmentFault, 3, OSError),
        (NumericalError, 4, ArithmeticError),
    ],
)
def test_exit_codes(kind: type[LdmError], code: int, also: type[Exception]) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, LdmError)
    assert issubclass(kind, also)
    assert str(kind("one sentence")) == "one sentence"


def test_the_example_of_the_docstring() -> None:
    assert doctest.testmod(errors).failed == 0


def test_an_unknown_name() -> None:
    assert errors.unknown("rule", "cgf", ["cfg"]) == "'cgf' is not a rule; did you mean 'cfg'? Choose from cfg"
    assert errors.unknown("entry", "x", ["b", "a"]) == "'x' is not an entry; choose from a, b"
    assert errors.unknown("rule", "x", []).endswith("choose from nothing: none are registered")
