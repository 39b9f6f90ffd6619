"""What a prompt says, as values: runs of text with weights, chunks, schedules and the parts that AND joins. No torch here.

`grammar.parse` makes them of a text. docs/prompts.md has the whole grammar with examples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WORD = r"[,.;:!?]|[^\s,.;:!?]+"  # or a sign


class Run(NamedTuple):
    """A piece of text and what its tokens are multiplied by."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Break:
    """Where a new chunk begins."""


@dataclass(frozen=True)
class Switch:
    """One text, then another. when: the step after which, counted from 1; share: as a share of the steps instead."""

    before: Items
    after: Items
    when: float
    share: bool = False


@dataclass(frozen=True)
class Turns:
    """One option at each step, in turn."""

    options: tuple[Items, ...]


Items = tuple[Run | Break | Switch | Turns, ...]


@dataclass(frozen=True)
class Wording:
    """What an encoder reads: the runs of each chunk."""

    chunks: tuple[tuple[Run, ...], ...]

    @property
    def text(self) -> str:
        """The words alone; between chunks stands a space."""
        return " ".join("".join(run.text for run in chunk) for chunk in self.chunks)

    @property
    def plain(self) -> bool:
        """Is it text alone, of weight 1 and in one chunk?"""
        return len(self.chunks) == 1 and all(run.weight == 1 for run in self.chunks[0])

    @property
    def joined(self) -> Wording:
        """The same in one chunk."""
        runs = [(*chunk, Run(" ")) for chunk in self.chunks]
        return Wording((merged([run for chunk in runs for run in chunk][:-1]),))

    def lowered(self) -> Wording:
        """In one chunk, in lower case, without spaces at the ends."""
        runs = [Run(r.text.lower(), r.weight) for r in self.joined.chunks[0]]
        while runs and not runs[0].text.strip():
            del runs[0]
        while runs and not runs[-1].text.strip():
            del runs[-1]
        if runs:
            runs[0] = runs[0]._replace(text=runs[0].text.lstrip())
            runs[-1] = runs[-1]._replace(text=runs[-1].text.rstrip())
        return Wording((tuple(runs),))

    def after(self, text: str) -> Wording:
        """The same behind a text of weight 1."""
        return Wording(((Run(text), *self.chunks[0]), *self.chunks[1:]))


@dataclass(frozen=True)
class Branch:
    """One of the parts that AND joins, with its weight."""

    items: Items
    weight: float = 1.0

    @property
    def scheduled(self) -> bool:
        """Does it say something else at other steps?"""
        return any(isinstance(item, Switch | Turns) for item in self.items)

    def at(self, step: int, steps: int) -> Wording:
        """What it says at a step of 0..steps - 1."""
        chunks: list[list[Run]] = [[]]
        for item in resolved(self.items, step, steps):
            if isinstance(item, Run):
                chunks[-1].append(item)
            else:
                chunks.append([])
        return Wording(tuple(merged(chunk) for chunk in chunks))


@dataclass(frozen=True)
class Prompt:
    """A prompt, read. notes: what a user may not have meant so."""

    branches: tuple[Branch, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of its branches."""
        return tuple(branch.weight for branch in self.branches)

    @property
    def scheduled(self) -> bool:
        """Does it say something else at other steps?"""
        return any(branch.scheduled for branch in self.branches)

    @property
    def plain(self) -> bool:
        """Is it text alone?"""
        return len(self.branches) == 1 and not self.scheduled and self.branches[0].at(0, 1).plain

    def at(self, step: int, steps: int) -> tuple[Wording, ...]:
        """What its branches say at a step of 0..steps - 1."""
        return tuple(branch.at(step, steps) for branch in self.branches)


Words = str | Wording  # a prompt as it stands, or one whose brackets were read


def once(prompts: Sequence[Words]) -> tuple[list[Words], list[int]]:
    """(the distinct prompts, which of them every prompt is), so that each is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    return distinct, [distinct.index(p) for p in prompts]


def spelled(prompt: Words) -> str:
    """The words of a prompt alone."""
    return prompt if isinstance(prompt, str) else prompt.text


def plain_words(prompt: str) -> list[str]:
    """The words of a prompt in lower case, without the signs between them: what a model with a closed list knows or not."""
    return re.findall(r"[^\W_]+", prompt.lower())


def clean(prompt: str) -> str:
    """What a tokenizer can take: lone surrogates and NUL stand for nothing that was ever trained."""
    return prompt.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def merged(items: Sequence[Any]) -> Any:
    """The items, runs of one weight side by side as one, none of them empty and no space around a Break, as a tuple."""
    found: list[Any] = []
    texts: list[str] = []
    weight = 1.0

    def close() -> None:
        text = "".join(texts)
        texts.clear()
        text = text.lstrip() if found and isinstance(found[-1], Break) else text
        if text:
            found.append(Run(text, weight))

    for item in items:
        if not isinstance(item, Run):
            close()
            while isinstance(item, Break) and found and isinstance(found[-1], Run):
                last = found.pop()
                if last.text.rstrip():
                    found.append(last._replace(text=last.text.rstrip()))
                    break
            found.append(item)
        elif item.text:
            if item.weight != weight:
                close()
            weight = item.weight
            texts.append(item.text)
    close()
    return tuple(found)


def resolved(items: Items, step: int, steps: int) -> Iterator[Run | Break]:
    """The runs and breaks of items at a step of 0..steps - 1."""
    for item in items:
        if isinstance(item, Switch):
            last = int(item.when * steps) if item.share else item.when
            yield from resolved(item.before if step + 1 <= min(last, steps) else item.after, step, steps)
        elif isinstance(item, Turns):
            yield from resolved(item.options[step % len(item.options)], step, steps)
        else:
            yield item
