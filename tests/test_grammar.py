"""The grammar of prompts: the documented readings of AUTOMATIC1111's web UI, a text and back, and what is hostile."""

from __future__ import annotations

import random
import time
from itertools import groupby

import pytest

from ldm_pipe.errors import UsageError
from ldm_pipe.grammar import parse, spoken, written
from ldm_pipe.prompt import Branch, Break, Items, Prompt, Run, Switch, Turns

# The examples that the web UI documents for its own parser, one step of a prompt without schedules.
RUNS: dict[str, list[tuple[str, float]]] = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "((word)) [word]": [("word", 1.21), (" ", 1.0), ("word", 1 / 1.1)],
    "(a [b) c] d": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1), (" d", 1.0)],
    "a) (b :.5 )": [("a) ", 1.0), ("b ", 0.5)],
    "(a:nan) (b:1.2.3)": [("a:nan", 1.1), (" ", 1.0), ("b:1.2.3", 1.1)],
    r"10:30 \x \\ a|b": [("10:30 \\x \\ a|b", 1.0)],
    "(a:-1)(b:0)": [("a", -1.0), ("b", 0.0)],
}  # fmt: skip

# And for its schedules, in ten steps: (last step, text).
STEPS: dict[str, list[tuple[int, str]]] = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a b")],
    "[(a:2):3]": [(3, ""), (10, "a")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [b::0.3] c": [(3, "a b c"), (10, "a  c")],
    "a [:b:2] c": [(2, "a  c"), (10, "a b c")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:1.3]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "((a][:b:c [d:3]": [(3, "a]:b:c "), (10, "a]:b:c d")],
    "[a|(b:1.1)]": [(k, "ba"[k % 2]) for k in range(1, 11)],
    "[fe|]male": [(k, ("male", "female")[k % 2]) for k in range(1, 11)],
    "[fe|||]male": [(1, "female"), (4, "male"), (5, "female"), (8, "male"), (9, "female"), (10, "male")],
    "[a:b:c:2]": [(10, "a:b:c:2")],
}


def runs(text: str) -> list[tuple[str, float]]:
    (wording,) = parse(text).at(0, 1)
    (chunk,) = wording.chunks
    return [(run.text, run.weight) for run in chunk]


@pytest.mark.parametrize("text", RUNS)
def test_weights_are_those_of_the_web_ui(text: str) -> None:
    found, wanted = runs(text), RUNS[text]
    assert [t for t, _ in found] == [t for t, _ in wanted]
    assert [w for _, w in found] == pytest.approx([w for _, w in wanted], rel=1e-12)


@pytest.mark.parametrize("text", STEPS)
def test_schedules_are_those_of_the_web_ui(text: str) -> None:
    said = [parse(text).at(step, 10)[0].text for step in range(10)]
    spans = [(list(group)[-1] + 1, words) for words, group in groupby(range(10), lambda k: said[k])]
    assert spans == STEPS[text]


def test_a_prompt_without_signs_is_itself() -> None:
    for text in ("", " ", "a  fox, on\ta blue-ish background! ", "10:30 | and break", "über\ud800\0"):
        assert (runs(text), parse(text).plain) == ([(text, 1.0)] if text else [], True)
        assert spoken(text) == written(parse(text)) == text
        assert parse(text).notes == ()


def test_break_and_and() -> None:
    (words,) = parse("a (b BREAK c:1.2) d BREAK").at(0, 1)
    assert words.chunks == ((Run("a "), Run("b", 1.2)), (Run("c", 1.2), Run(" d")), ())
    assert words.text == "a b c d "
    assert words.joined.chunks[0] == (Run("a "), Run("b", 1.2), Run(" "), Run("c", 1.2), Run(" d "))
    prompt = parse("a fox :1.2 AND a (hat:1.5):-.5 AND 10\\:30 AND \\AND")
    assert prompt.weights == (1.2, -0.5, 1.0, 1.0)
    assert [w.text for w in prompt.at(0, 1)] == ["a fox", "a hat", "10:30", "AND"]
    assert spoken("a [fox:cat:0.5] AND (b)") == "a fox b"
    assert parse("a AND b", joins=False).at(0, 1)[0].text == "a AND b"
    assert parse("SAND BREAKER a fox :1.2").plain


def test_what_may_not_be_meant_is_said() -> None:
    said = {
        "a (b": "a ( of the prompt is never closed", "a [b": "a [ of the prompt is never closed", "a) b": "closes nothing",
        "[a:b]": "is no schedule", "[a|b:0.5]": "is no schedule", "[a:1.3]": "never switches",
    }  # fmt: skip
    for text, words in said.items():
        (note,) = parse(text).notes
        assert words in note
    for text in ("(a:1.2) [b] [c:d:0.5] [e|f] BREAK AND", r"\(a"):
        assert parse(text).notes == ()


LETTERS = ["a", "b", " ", "(", ")", "[", "]", "\\", ":", "|", "1", ".", "AND", "BREAK", " AND ", "é", "\n", "-"]


def items(draw: random.Random, depth: int) -> Items:
    """Random items as `parse` gives them: no empty run, none of one weight side by side, no space around a BREAK."""
    made: list[Run | Break | Switch | Turns] = []
    for _ in range(draw.randrange(4)):
        kind = draw.random()
        if kind < 0.6 or depth == 0:
            text = "".join(draw.choices(LETTERS, k=draw.randrange(1, 6)))
            weight = draw.choice([1.0, 1.0, 1.1, 1 / 1.1, 0.0, -2.5, draw.uniform(-3, 3), 1e-7, 1e12])
            text = text.strip() or "x"
            last = made[-1] if made else None
            if not (isinstance(last, Run) and last.weight == weight):
                made.append(Run(text, weight))
        elif kind < 0.7:
            made.append(Break())
        elif kind < 0.85:
            share = draw.random() < 0.5
            when = draw.choice([0.5, 1.0, 0.25, 1 / 3]) if share else float(draw.randrange(-1, 40))
            made.append(Switch(items(draw, depth - 1), items(draw, depth - 1), when, share))
        else:
            made.append(Turns(tuple(items(draw, depth - 1) for _ in range(draw.randrange(2, 4)))))
    return tuple(made)


def test_a_prompt_written_and_read_is_the_same() -> None:
    draw = random.Random(0)
    for _ in range(1500):
        count = draw.choice([1, 1, 2, 3])
        weights = [draw.choice([1.0, 1.2, -0.5, 1e-9]) for _ in range(count)] if count > 1 else [1.0]
        prompt = Prompt(tuple(Branch(items(draw, 3), w) for w in weights))
        assert parse(written(prompt)) == prompt, written(prompt)


def test_any_text_is_read_and_what_is_written_of_it_is_the_same() -> None:
    draw = random.Random(1)
    for _ in range(1500):
        text = "".join(draw.choices([*LETTERS, ":1.3)", ":0.5]", "(", "["], k=draw.randrange(30)))
        prompt = parse(text)
        assert parse(written(prompt)) == prompt, text


HOSTILE = {
    "open": "(" * 10_000 + "a", "open squares": "[" * 10_000 + "a", "closed": "]" * 10_000,
    "deep": "[" * 10_000 + "a" + "]" * 10_000,
    "heavy": "(a" * 10_000, "schedules": "[a:" * 10_000 + "b" + ":1]" * 10_000, "turns": "[a|" * 10_000 + "]" * 10_000,
    "no number": "(a:nan) (b:inf) (c:1e999)", "huge": "(a:" + "9" * 5000 + ")", "huge part": "a :" + "9" * 999 + " AND b",
    "parts": "a AND " * 10_000, "colons": ":" * 50_000, "spaces": "a :" + " " * 50_000, "backslashes": "\\" * 50_000,
    "far": "[a:b:" + "1" * 5000 + "]", "alternations": "[a|b]" * 10_000, "breaks": "BREAK " * 10_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts_are_read_or_refused_in_one_line_soon(name: str) -> None:
    started = time.process_time()
    if name in ("open", "heavy", "schedules", "turns", "huge", "huge part", "parts"):
        with pytest.raises(UsageError) as caught:
            parse(HOSTILE[name])
        assert len(str(caught.value)) < 160
    else:
        prompt = parse(HOSTILE[name])
        assert len(prompt.at(0, 10)) == 1
        assert len("; ".join(prompt.notes)) < 400
    assert time.process_time() - started < 2
