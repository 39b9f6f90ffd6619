"""Values from text and TOML: what fits a type is taken, everything else is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ldm_pipe import UsageError
from ldm_pipe.strict import build, coerce

TAKEN: list[Any] = [
    (3, int, 3),
    ("3", int, 3),
    ("-3", int, -3),
    pytest.param(10**400, int, 10**400, id="large"),
    (3, float, 3.0),
    ("0.5", float, 0.5),
    ("1e-3", float, 0.001),
    (True, bool, True),
    ("True", bool, True),
    ("false", bool, False),
    ("", str, ""),
    ("3", str, "3"),
    ("ve", Literal["ve", "x0"], "ve"),
    (None, int | None, None),
    ("none", int | None, None),
    ("None", float | None, None),
    ("3", int | None, 3),
    ("none", str, "none"),
    ("3", int | str, 3),
    ("x", int | str, "x"),
    ([1, 2], tuple[int, int], (1, 2)),
    (("1", 2), tuple[int, float], (1, 2.0)),
    ([], tuple[str, ...], ()),
    (["a", "b", "c"], tuple[str, ...], ("a", "b", "c")),
    ([[1], []], tuple[tuple[int, ...], ...], ((1,), ())),
    (object, Any, object),
]
REFUSED: list[Any] = [
    (3.0, int, "a whole number"),
    ("3.0", int, "a whole number"),
    (True, int, "a whole number"),
    (None, int, "a whole number"),
    ([], int, "a whole number"),
    pytest.param("9" * 5000, int, "a whole number", id="very long"),
    (False, float, "number"),
    ("much", float, "number"),
    ("nan", float, "number"),
    (float("inf"), float, "number"),
    ("1e999", float, "number"),
    pytest.param(10**400, float, "number", id="large"),
    ([1.0], float, "number"),
    (1, bool, "true or false"),
    ("yes", bool, "true or false"),
    (3, str, "text"),
    (None, str, "text"),
    ("vee", Literal["ve", "x0"], "choose from ve, x0"),
    (["ve"], Literal["ve", "x0"], "choose from ve, x0"),
    ("x", int | None, "a whole number"),
    (None, int | str, "text"),
    ([1], tuple[int, int], "takes 2 values, got 1"),
    ([1, "x"], tuple[int, int], "a whole number"),
    ("12", tuple[int, int], "takes a list"),
    (3, tuple[int, ...], "takes a list"),
]


@pytest.mark.parametrize(("value", "hint", "expected"), TAKEN)
def test_what_fits_is_taken(value: Any, hint: Any, expected: Any) -> None:
    found = coerce(value, hint, "here")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("value", "hint", "says"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(value: Any, hint: Any, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        coerce(value, hint, "recipe: field")
    assert str(caught.value).startswith("recipe: field ")
    assert says in str(caught.value)


@dataclass(frozen=True)
class Recipe:
    """A dataclass as a method would have it."""

    steps: int
    rate: float = 0.1
    size: tuple[int, int] = (1, 2)
    parts: tuple[str, ...] = field(default_factory=tuple)
    made: int = field(init=False, default=0)


def test_a_dataclass_from_a_mapping() -> None:
    assert build(Recipe, {"steps": "4", "size": [3, 4]}) == Recipe(4, 0.1, (3, 4))
    assert build(Recipe, {"steps": 4, "rate": 1, "parts": ["a"]}) == Recipe(4, 1.0, parts=("a",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Recipe needs steps"),
        ({"step": 4}, "'step' is not a field of Recipe; did you mean 'steps'"),
        ({"steps": 4, "made": 1}, "'made' is not a field of Recipe"),
        ({"steps": None}, "Recipe: steps is None"),
        ({"steps": 1, "size": [1, 2, 3]}, "Recipe: size takes 2 values, got 3"),
    ],
)
def test_a_wrong_mapping_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(Recipe, values)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        build(Recipe, values, "recipe.toml")
