"""The grammar of prompts, that of AUTOMATIC1111's web UI: a text to a `Prompt` and back. No torch here.

Read in one pass over the brackets, whatever their number and depth. docs/prompts.md has the whole grammar with examples.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from ldm_pipe.errors import UsageError
from ldm_pipe.prompt import Branch, Break, Items, Prompt, Run, Switch, Turns, merged

MORE, LESS = 1.1, 1 / 1.1  # what a pair of round and of square brackets multiply by
DEEPEST, MOST_PARTS = 16, 16  # schedules within schedules; parts joined by AND
FAR = 1e9  # a step that no walk reaches
FIRST = (0, 1000)  # the first step of many: before any switch
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_TOKEN = re.compile(rf"\\(AND\b|BREAK\b|[()\[\]\\:|])|([(\[\]|])|:\s*({_NUMBER})\s*\)|([):])|([^()\[\]\\:|]+|\\)")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\\(?:AND\b|[()\[\]\\:|])|\b(AND)\b")
_WEIGHT = re.compile(rf":\s*({_NUMBER})$")
_SPECIAL = re.compile(r"[()\[\]\\]|\b(?:AND|BREAK)\b")


def spoken(text: str, plain: bool = False) -> str:
    """The words of a prompt at its first step, without the grammar; the text itself where it is `plain`."""
    return text if plain else " ".join(wording.text for wording in parse(text).at(*FIRST))


@functools.lru_cache(maxsize=512)
def parse(text: str, joins: bool = True) -> Prompt:
    """Read a prompt. joins: AND joins parts; in a negative prompt it is a word.

    Brackets without a partner are no error: an open one reaches to the end, a closing one is text. Raises UsageError on a
    weight that is not finite and on more nesting or parts than there may be.
    """
    texts = _parts(text) if joins else [(text, 1.0)]
    if len(texts) > MOST_PARTS:
        raise UsageError(f"a prompt joins {len(texts)} parts by AND; it takes at most {MOST_PARTS}")
    notes: list[str] = []
    read = [_items(part, notes) for part, _ in texts]
    if len(read) > 1:  # nothing is said by spaces around AND
        read = [merged([Break(), *items, Break()])[1:-1] for items in read]
    branches = tuple(Branch(items, weight) for items, (_, weight) in zip(read, texts, strict=True))
    if not all(math.isfinite(branch.weight) for branch in branches):
        raise UsageError("a part of a prompt that AND joins has a weight that is not finite")
    return Prompt(branches, tuple(dict.fromkeys(notes)))


def _parts(text: str) -> list[tuple[str, float]]:
    """The parts that AND joins, stripped, with their weights; a text without AND is one part as it is."""
    cuts = [m.span() for m in _AND.finditer(text) if m[1]]
    if not cuts:
        return [(text, 1.0)]
    edges = [0, *(edge for cut in cuts for edge in cut), len(text)]
    found = []
    for part in (text[a:b].strip() for a, b in zip(edges[::2], edges[1::2], strict=True)):
        weight = _WEIGHT.search(part)
        if weight and not _escaped(part, weight.start()):
            found.append((part[: weight.start()].rstrip(), float(weight[1])))
        else:
            found.append((part, 1.0))
    return found


def _escaped(text: str, place: int) -> bool:
    """Does an odd number of backslashes stand before a place?"""
    return (place - len(text[:place].rstrip("\\"))) % 2 == 1


class _Token(NamedTuple):
    """kind: a sign, ")" with the weight that stands before it, "text", or "literal", which was escaped."""

    kind: str
    text: str
    weight: str = ""


def _tokens(text: str) -> list[_Token]:
    found = []
    for m in _TOKEN.finditer(text):
        escaped, sign, weight, other, plain = m.groups()
        if escaped:
            found.append(_Token("literal", escaped))
        elif weight:
            found.append(_Token(")", m[0], weight))
        elif sign or other:
            found.append(_Token(m[0], m[0]))
        else:
            found.append(_Token("text", plain))
    return found


class _Schedule(NamedTuple):
    """Square brackets that are a schedule. when: the token of a Switch's step, None for Turns."""

    signs: tuple[int, ...]
    when: str | None


def _schedules(tokens: Sequence[_Token], notes: list[str]) -> dict[int, _Schedule]:
    """By the place of the opening bracket. What is inside is balanced; around it brackets need not be."""
    found: dict[int, _Schedule] = {}
    stack: list[tuple[str, int, list[int]]] = []
    for i, (kind, _, _) in enumerate(tokens):
        if kind in ("(", "["):
            stack.append((kind, i, []))
        elif kind in (":", "|") and stack:
            stack[-1][2].append(i)
        elif kind in (")", "]"):
            if not stack or stack[-1][0] != {")": "(", "]": "["}[kind]:
                stack.clear()  # what was opened before holds a bracket without a partner
                continue
            _, start, signs = stack.pop()
            if kind == "]" and signs:
                kinds, last = {tokens[s].kind for s in signs}, tokens[signs[-1] + 1 : i]
                timed = len(last) == 1 and last[0].kind == "text" and re.fullmatch(rf"\s*{_NUMBER}\s*", last[0].text)
                if kinds == {"|"}:
                    found[start] = _Schedule((*signs, i), None)
                elif kinds == {":"} and len(signs) <= 2 and timed:
                    found[start] = _Schedule((*signs, i), last[0].text.strip())
                else:
                    notes.append("a [...] with : or | inside is no schedule and only lowers a weight; see docs/prompts.md")
    return found


def _factors(tokens: Sequence[_Token], schedules: dict[int, _Schedule], notes: list[str]) -> tuple[dict[int, float], set[int]]:
    """(what the opening brackets that weigh multiply by, the closing ones that end them)."""
    inside = {i for start, schedule in schedules.items() for i in (start, schedule.signs[-1])}
    factors, ends = dict[int, float](), set[int]()
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for i, (kind, _, weight) in enumerate(tokens):
        if i in inside:
            continue
        if kind in opened:
            opened[kind].append(i)
        elif kind in (")", "]"):
            mine = opened["(" if kind == ")" else "["]
            if mine:
                factors[mine.pop()] = float(weight) if weight else MORE if kind == ")" else LESS
                ends.add(i)
            else:
                notes.append(f"a {kind} of the prompt closes nothing and is read as text")
    for kind, factor, words in (("(", MORE, "more"), ("[", LESS, "less")):
        factors |= dict.fromkeys(opened[kind], factor)
        if opened[kind]:
            notes.append(f"a {kind} of the prompt is never closed: what follows it counts {words}, x{factor:.2g}")
    return factors, ends


def _items(text: str, notes: list[str]) -> Items:
    """The items of one part."""
    tokens = _tokens(text)
    schedules = _schedules(tokens, notes)
    factors, ends = _factors(tokens, schedules, notes)
    weights = {"(": [1.0], "[": [1.0]}
    frames: list[tuple[_Schedule | None, list[list[Any]]]] = [(None, [[]])]
    for i, (kind, own, _) in enumerate(tokens):
        schedule, segments = frames[-1]
        if i in schedules:
            if len(frames) > DEEPEST:
                raise UsageError(f"a prompt nests schedules [...] more than {DEEPEST} deep")
            frames.append((schedules[i], [[]]))
        elif schedule is not None and i == schedule.signs[-1]:
            frames.pop()
            frames[-1][1][-1].append(_node(schedule, segments, notes))
        elif schedule is not None and i in schedule.signs:
            segments.append([])
        elif i in factors:
            weights[kind].append(weights[kind][-1] * factors[i])
        elif i in ends:
            weights["(" if kind == ")" else "["].pop()
        else:
            weight = weights["("][-1] * weights["["][-1]
            if not math.isfinite(weight):
                raise UsageError(f"the weight of {own.strip()!r:.40} in a prompt is not finite")
            for k, part in enumerate(_BREAK.split(own) if kind == "text" else [own]):
                segments[-1].extend([Break(), Run(part, weight)] if k else [Run(part, weight)])
    return merged(frames[0][1][0])


def _node(schedule: _Schedule, segments: list[list[Any]], notes: list[str]) -> Switch | Turns:
    parts = [merged(segment) for segment in segments]
    if schedule.when is None:
        return Turns(tuple(parts))
    share, when = "." in schedule.when, max(-FAR, min(FAR, float(schedule.when)))
    if share and when > 1:
        notes.append(f"[...:{when:g}] never switches: with a point it is a share of the steps; a weight is (...:{when:g})")
    return Switch(parts[0] if len(parts) == 3 else (), parts[-2], when, share)


def written(prompt: Prompt) -> str:
    """The text of a prompt, weights by numbers: `parse(written(p)) == p`."""
    joins = len(prompt.branches) > 1
    return " AND ".join(_branch(branch, joins) for branch in prompt.branches)


def _branch(branch: Branch, joins: bool) -> str:
    text = _text(branch.items, False)
    return f"{text} :{_number(branch.weight)}" if branch.weight != 1 or (joins and _WEIGHT.search(text)) else text


def _text(items: Items, inside: bool) -> str:
    """inside: of a schedule, where : and | are signs."""
    found = []
    for item in items:
        if isinstance(item, Break):
            found.append(" BREAK ")
        elif isinstance(item, Turns):
            found.append(f"[{'|'.join(_text(option, True) for option in item.options)}]")
        elif isinstance(item, Switch):
            when = _number(item.when) if item.share else f"{item.when:.0f}"
            point = ".0" if item.share and "." not in when else ""
            found.append(f"[{_text(item.before, True)}:{_text(item.after, True)}:{when}{point}]")
        else:
            text = _SPECIAL.sub(lambda m: f"\\{m[0]}", item.text)
            text = re.sub(r"[:|]", lambda m: f"\\{m[0]}", text) if inside else text
            found.append(text if item.weight == 1 else f"({text}:{_number(item.weight)})")
    return "".join(found)


def _number(value: float) -> str:
    """All digits, without an exponent."""
    return format(Decimal(repr(value)), "f")
