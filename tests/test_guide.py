"""Guidance as text builds exactly the rules that Python builds, and nothing is ever evaluated."""

from __future__ import annotations

import pytest

from ldm_pipe import CFG, Between, Rescale, UsageError, build
from ldm_pipe.guide import guides, parse


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("cfg(5)", CFG(5)),
        ("cfg", CFG()),
        ("cfg(scale=2.5)", CFG(2.5)),
        ("cfg(5) | rescale(0.7)", Rescale(0.7, CFG(5))),
        ("cfg(5)|rescale(0.7,space='x0')|between(0.2, 0.9)", Between(0.2, 0.9, Rescale(0.7, CFG(5), "x0"))),
        ("between(0, 1)", Between(0, 1)),
    ],
)
def test_a_text_is_its_rule(text: str, rule: object) -> None:
    assert parse(text) == rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not of the form"),
        ("cfg(5", "not of the form"),
        ("5", "not of the form"),
        ("cfg.scale(5)", "not of the form"),
        ("cgf(5)", "did you mean 'cfg'"),
        ("cfg(skale=5)", "did you mean 'scale'"),
        ("clip(5) | cfg(5)", "put it last"),
        ("cfg('much')", "it takes a finite number"),
        ("cfg(1, 2, 3, 4)", "takes 3 value"),
        ("cfg(open('x'))", "not a number or a quoted text"),
        ("cfg(__import__('os').system('true'))", "not a number or a quoted text"),
        ("between(0.2, 0.9) | cfg(5)", "wraps no other rule"),
        ("between(0.9, 0.2)", "0 <= lo <= hi <= 1"),
        ("between(0.1)", "needs hi"),
        ("rescale(0.5, space='eps2')", "choose from x0, eps, v"),
    ],
)
def test_a_wrong_text_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)


def test_guides_stand_last_and_correct_what_the_rules_make() -> None:
    text = "cfg(5) | between(0.2, 0.9) | clip(50, text='a fox')"
    assert parse(text) == Between(0.2, 0.9, CFG(5))
    assert guides(text) == (build("guide", "clip", scale=50, text="a fox"),)
    assert parse("clip") == CFG(1)
    assert guides("cfg(5)") == ()
    with pytest.raises(UsageError, match="--guide: guide classifier: log_prob is 2"):
        guides("classifier(2)")
