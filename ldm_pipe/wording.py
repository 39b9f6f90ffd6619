"""What prompts say along a walk: conditions that follow a schedule over the levels, and parts that AND joins.

Schedules are those of AUTOMATIC1111's web UI; AND is Compositional Visual Generation with Composable Diffusion Models, Liu et
al. 2022, arXiv 2206.01714, eq. 11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe import registry
from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError
from ldm_pipe.grammar import parse
from ldm_pipe.guidance.compose import Compose
from ldm_pipe.level import Level
from ldm_pipe.model import CondAt, Estimate, Rule, chain
from ldm_pipe.prompt import Prompt
from ldm_pipe.text import TextEncoder, Words

COND, UNCOND = "cond", "uncond"
LOOK = 24  # steps whose words are looked at before a run
State = Mapping[str, tuple[Words, ...]]
Encode = Callable[[State, int], dict[str, Cond]]


@dataclass(frozen=True)
class Script:
    """What the prompts of images say at every step of a walk. Images that are computed together join parts of the same weights;
    where others are read beside them, a prompt of fewer parts repeats its last one, which no rule asks for.

    rows: a prompt for each image. named: prompts of further branches, the same for all images. borders: u of the distinct
    levels of the walk, falling: step i has borders[i] >= u > borders[i + 1], whatever a sampler asks in between.
    """

    rows: tuple[Prompt, ...]
    negative: Prompt
    named: Mapping[str, Prompt]
    borders: tuple[float, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], negative: str, named: Mapping[str, str], levels: Sequence[Level]) -> Script:
        """Read the prompts. Raises UsageError as `parse` does."""
        borders = tuple(sorted({float(level.u) for level in levels}, reverse=True))
        others = {name: parse(text, joins=False) for name, text in named.items()}
        return cls(tuple(parse(p) for p in prompts), parse(negative, joins=False), others, borders)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts that AND joins."""
        return self.rows[0].weights

    @property
    def steps(self) -> int:
        """Of the walk; 1 where nothing is scheduled."""
        scheduled = any(p.scheduled for p in (*self.rows, self.negative, *self.named.values()))
        return max(1, len(self.borders) - 1) if scheduled else 1

    def step(self, level: Level) -> int:
        """The step, from 0, to which a level belongs."""
        u = float(level.u)
        return min(max(0, sum(border >= u for border in self.borders) - 1), self.steps - 1)

    def at(self, step: int) -> dict[str, tuple[Words, ...]]:
        """The words of every branch at a step, one for each image."""
        rows, count = [p.at(step, self.steps) for p in self.rows], len(self.rows)
        found: dict[str, tuple[Words, ...]] = {COND: tuple(row[0] for row in rows)}
        found[UNCOND] = self.negative.at(step, self.steps) * count
        names = joined_names(max((p.weights for p in self.rows), key=len))
        found |= {name: tuple(row[min(k, len(row) - 1)] for row in rows) for k, name in enumerate(names) if k}
        return found | {name: p.at(step, self.steps) * count for name, p in self.named.items()}

    def chunks(self, text: TextEncoder) -> int:
        """How many windows of the encoder the longest of all words takes."""
        words = {w for step in range(self.steps) for row in self.at(step).values() for w in row}
        return max(map(text.chunks, words))

    def conds(self, text: TextEncoder, encode: Encode) -> dict[str, Cond | CondAt]:
        """The condition of every branch, a function of the level where its words change. encode: makes conditions of words that
        are filled up to so many windows; each set of words is encoded once."""
        chunks = self.chunks(text)
        states = [self.at(step) for step in range(self.steps)]
        keys = [tuple(state.items()) for state in states]
        made: dict[Any, dict[str, Cond]] = {}

        def encoded(step: int) -> dict[str, Cond]:
            if keys[step] not in made:
                words = {name: tuple(_short(w, chunks) for w in row) for name, row in states[step].items()}
                made[keys[step]] = encode(words, chunks)
            return made[keys[step]]

        def follows(name: str) -> Callable[[Level], Cond]:
            return lambda level: encoded(self.step(level))[name]

        first = encoded(0)
        return {name: follows(name) if len(set(keys)) > 1 else cond for name, cond in first.items()}


def _short(words: Words, chunks: int) -> Words:
    """Words without weights in one window, as the text that they are."""
    return words.text if chunks == 1 and not isinstance(words, str) and words.plain else words


def reads(text: TextEncoder, plain: bool) -> bool:
    """Are the brackets of prompts read for this encoder? Not where they are turned off, nor where prompts are names."""
    return not plain and text.chunks("") > 0


def joined_names(weights: Sequence[float]) -> tuple[str, ...]:
    """The branches of the parts that AND joins: "cond", "and:1", ..."""
    return (COND, *(f"and:{k}" for k in range(1, len(weights))))


@dataclass(frozen=True)
class Conjunction:
    """Another rule that sees, as its positive branch, u + sum of weight_i (p_i - u) of the parts p_i of a prompt and the
    branch u of the negative one (`Compose`). Under CFG of scale s that is u + s * sum of weight_i (p_i - u)."""

    weights: tuple[float, ...]
    rule: Rule

    @property
    def parts(self) -> Compose:
        """What the positive branch is."""
        return Compose(joined_names(self.weights), self.weights, UNCOND)

    def needs(self, level: Level) -> tuple[str, ...]:
        """The parts in the place of "cond", and what else the rule needs."""
        wanted = self.rule.needs(level)
        return tuple(dict.fromkeys((*(self.parts.needs(level) if COND in wanted else ()), *wanted)))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The rule's estimate."""
        if COND in self.rule.needs(level):
            estimates = {**estimates, COND: self.parts(estimates, x, level)}
        return self.rule(estimates, x, level)


def joined(rule: Rule, weights: tuple[float, ...], inserts: str | None = None) -> Rule:
    """The rule for prompts of several parts; itself for one. inserts: as of `Bundle`.

    Raises UsageError where the rule asks another network under one condition, asks a branch for some images only, or has no
    place for the prompt.
    """
    if len(weights) == 1:
        return rule
    if inserts == "picture":
        raise UsageError("AND does not go with a model that edits pictures: its guidance is by one text and the picture")
    for part in chain(rule):
        if any(hasattr(part, name) for name in ("others", "rows", "suits")):
            kind = f":{type(part).__name__}"
            name = next((n for n, target in registry.KINDS["rule"].items() if target.endswith(kind)), "this rule")
            raise UsageError(f"AND does not go with {name}, which takes one prompt; cfg, apg, rescale and the like take it")
    if COND not in rule.needs(Level(0.5, 0.5)):
        raise UsageError("AND does not go with a --guide that names its own prompts; write them all with AND, or there")
    return Conjunction(weights, rule)


def notices(text: TextEncoder, prompt: str, plain: bool, joins: bool = True) -> list[str]:
    """What a user should know of a prompt: how brackets were read that have no partner, and what the encoder does not know or
    see of its words. joins: as of `parse`."""
    if not reads(text, plain):
        return text.notices(prompt)
    read = parse(prompt, joins)
    steps = LOOK if read.scheduled else 1
    words: dict[Any, None] = dict.fromkeys(w for step in range(steps) for w in read.at(step, steps))
    return list(dict.fromkeys([*(["; ".join(read.notes)] if read.notes else []), *(n for w in words for n in text.notices(w))]))
