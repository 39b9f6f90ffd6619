"""Prompts that take several windows of a CLIP: which tokens stand in which, and where the words of a prompt are among them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from ldm_pipe.prompt import WORD

MOST_CHUNKS = 40  # windows of one prompt
Chunk = tuple[str, Sequence[tuple[int, float, int]]]  # a text, and `tokens.weighed` of it


class Piece(NamedTuple):
    """A token with its weight. chunk, start: of the prompt, and the character of it at which the token begins."""

    id: int
    weight: float
    chunk: int
    start: int


def pieces(chunks: Sequence[Chunk], room: int) -> list[list[Piece]]:
    """The tokens of every window of `room`, the two ends left out; a word that does not fit begins the next one."""
    found = []
    for number, (text, tokens) in enumerate(chunks):
        inner = [Piece(i, w, number, start) for i, w, start in tokens if start >= 0]
        first = 0
        while first < len(inner) or not first:
            end = min(first + room, len(inner))
            while end < len(inner) and end > first and _within_a_word(text, inner[end].start):
                end -= 1
            end = end if end > first else min(first + room, len(inner))  # one word that is longer than the window
            found.append(inner[first:end])
            first = max(end, 1)
    return found


def _within_a_word(text: str, place: int) -> bool:
    """Does a character go on with the word of the one before it?"""
    return place > 0 and text[place - 1].isalnum() and text[place].isalnum()


def placed(chunks: Sequence[Chunk], window: int) -> list[tuple[str, list[int]]]:
    """The words of a prompt in order, each with its places among the tokens of all windows side by side; none where it is not
    seen."""
    words = [list(re.finditer(WORD, text)) for text, _ in chunks]
    found: list[list[list[int]]] = [[[] for _ in row] for row in words]
    for number, row in enumerate(pieces(chunks, window - 2)[:MOST_CHUNKS]):
        for place, piece in enumerate(row):
            word = bisect_right([match.start() for match in words[piece.chunk]], piece.start) - 1
            if word >= 0:
                found[piece.chunk][word].append(number * window + 1 + place)
    return [
        (match[0].lower(), spots) for row, at in zip(words, found, strict=True) for match, spots in zip(row, at, strict=True)
    ]


def cut(over: int, window: int) -> list[str]:
    """The sentence for tokens that are not seen, where there are any."""
    return [f"the prompt is {over} token(s) longer than the {window} of the encoder; the end is not seen"] if over else []
