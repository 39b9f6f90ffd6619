"""A name with values is read as it stands: commas in quotes and brackets part nothing, and nothing is evaluated."""

from __future__ import annotations

import time

import pytest

from ldm_pipe import UsageError
from ldm_pipe.calls import by_field, fields, read


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("cfg", []),
        (" cfg ( 5 ) ", [(None, "5")]),
        ("cfg()", []),
        ("a(1, b = 2,)", [(None, "1"), ("b", "2")]),
        (
            "a('x, y', \"it's\", (1, 2), b=[(1, 2), 3])",
            [(None, "'x, y'"), (None, '"it\'s"'), (None, "(1, 2)"), ("b", "[(1, 2), 3]")],
        ),
        ("a('b=c')", [(None, "'b=c'")]),
        ("mask(hole (1).png)", [(None, "hole (1).png")]),
        ("a(open('x'))", [(None, "open('x')")]),
    ],
)
def test_values_stand_as_they_are(text: str, parts: list[tuple[str | None, str]]) -> None:
    found = read(text)
    assert found is not None
    assert found == (text.partition("(")[0].strip(), parts)


@pytest.mark.parametrize(
    "text", ["", "5", "a(", "a(5", "a)", "a.b(5)", "a(,)", "a(1,,2)", "a('x)", "a(5)(3)", "a b(5)", "a( , 1)"]
)
def test_what_is_not_of_the_form_is_none(text: str) -> None:
    assert read(text) is None


def test_a_hostile_text_is_read_in_no_time() -> None:
    began = time.process_time()
    for text in ("a(" + "(" * 20_000, "a(" + " " * 20_000 + "'", "a(" + "x" * 20_000 + "'", "a(" + "(,)" * 20_000 + "'"):
        assert read(text) is None
    assert time.process_time() - began < 1


def test_values_have_the_fields_of_their_places() -> None:
    given = [(None, "1"), ("c", "3")]
    assert by_field("a", given, ["b", "c"], "patch") == {"b": "1", "c": "3"}
    with pytest.raises(UsageError, match=r"patch a takes 1 value\(s\) \(b\), got 2"):
        by_field("a", given, ["b"], "patch")
    with pytest.raises(UsageError, match="patch a: b stands twice"):
        by_field("a", [(None, "1"), ("b", "3")], ["b", "c"], "patch")


def test_texts_of_operators_and_patches_lose_their_quotes() -> None:
    assert fields("mask('a, b.png')", "operator") == ("mask", {"known": "a, b.png"})
    assert fields("tome(ratio=0.25)", "patch") == ("tome", {"ratio": "0.25"})
    assert fields("faster(0 2 5)", "patch") == ("faster", {"keys": "0 2 5"})
    for text in ("pool('4)", "pool(__import__('os'))", "pool(4'')"):
        with pytest.raises(UsageError, match="is not of the form"):
            fields(text, "operator")
