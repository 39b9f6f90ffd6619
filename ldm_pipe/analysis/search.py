"""AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model Acceleration, Li et
al. 2023, arXiv 2309.10438: an evolutionary search for the few times at which a network is best asked.

A candidate is a set of distinct times. The fitness is whatever the caller measures of one: the paper's is the FID of 1000
images, a cheap one the distance to a walk of many steps from the same noise. What is found goes into the spacing `file` with
unit "time".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Path
from ldm_pipe.levels import linspace, trailing

Times = tuple[int, ...]
MOST_DRAWS = 1000


class Found(NamedTuple):
    """The best candidate (times fall), its fitness, the best fitness after each generation, and how many were measured."""

    times: Times
    fitness: float
    history: tuple[float, ...]
    measured: int


@dataclass(frozen=True)
class Search:
    """The paper's evolution: keep the best, mutate and cross them, fill up at random; nothing is measured twice.

    population: candidates of a generation. keep: parents of the next. mutations, crossovers: their children. chance: that a
    mutation replaces an entry. epochs: generations after the first, which holds the caller's candidates, mutations of them and
    random ones. seed: the same seed finds the same.
    """

    population: int = 50
    keep: int = 10
    mutations: int = 25
    crossovers: int = 15
    chance: float = 0.25
    epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        children = min(self.epochs, self.mutations, self.crossovers)
        if not (1 <= self.keep <= self.population and 0 < self.chance <= 1 and children >= 0):
            raise UsageError("search needs 1 <= keep <= population, chance above 0 to 1, and no negative number of children")

    def __call__(self, fitness: Callable[[Times], float], places: int, first: Sequence[Sequence[int]]) -> Found:
        """The times of 0..places - 1 with the least fitness found. first: candidates to begin with, such as an even spacing;
        all have the same number of distinct times. Raises UsageError where they have not."""
        steps = len(first[0]) if first else 0
        starts = [tuple(sorted(set(c), reverse=True)) for c in first]
        inside = all(len(c) == steps and c[-1] >= 0 and c[0] < places for c in starts)
        if not (0 < steps <= places and inside):
            raise UsageError(f"search begins with candidates of one number of distinct times from 0 to {places - 1}")
        random = np.random.Generator(np.random.Philox(key=self.seed))
        known: dict[Times, float] = {}
        history: list[float] = []
        parents: list[Times] = starts
        for epoch in range(self.epochs + 1):
            made = list(parents) if epoch == 0 else []
            chosen = random.integers(len(parents), size=self.mutations)
            made += [_mutated(parents[k], places, self.chance, random) for k in chosen]
            if epoch:
                picks = random.integers(len(parents), size=(self.crossovers, 2))
                made += [c for a, b in picks if (c := _crossed(parents[a], parents[b], random)) is not None]
            new = [c for c in dict.fromkeys(made) if c not in known]
            new += self._others(known, new, places, steps, random)
            known |= {c: float(fitness(c)) for c in new}
            parents = sorted(known, key=lambda c: (known[c], c))[: self.keep]
            history.append(known[parents[0]])
        return Found(parents[0], history[-1], tuple(history), len(known))

    def _others(
        self, known: dict[Times, float], new: list[Times], places: int, steps: int, random: np.random.Generator
    ) -> list[Times]:
        """Random candidates that fill a generation up, as far as there are any left."""
        found: dict[Times, None] = {}
        for _ in range(MOST_DRAWS):
            if len(new) + len(found) >= self.population:
                break
            drawn = tuple(sorted(random.choice(places, steps, replace=False).tolist(), reverse=True))
            if drawn not in known and drawn not in new:
                found[drawn] = None
        return list(found)


def walk_of(path: Path, times: Sequence[int]) -> list[Level]:
    """The levels of a candidate: a table's times, or thousandths of a continuous path (0 is its first)."""
    scale = 1.0 if path.discrete else (path.last - path.first) / 999
    return [*(path.level(path.first + t * scale) for t in times), CLEAN]


def even(path: Path, steps: int) -> list[Times]:
    """Two candidates to begin with: the times of `trailing` and of `linspace`."""
    scale = 1.0 if path.discrete else (path.last - path.first) / 999
    walks = (s(path, steps)[:-1] for s in (trailing, linspace))
    found = [tuple(round((float(path.time(lv)) - path.first) / scale) for lv in walk) for walk in walks]
    return [c for c in dict.fromkeys(found) if len(set(c)) == steps]


def _mutated(parent: Times, places: int, chance: float, random: np.random.Generator) -> Times:
    """Each entry with that chance replaced by a time that is not in the candidate."""
    child = list(parent)
    for k in range(len(child)):
        if random.random() < chance and len(child) < places:
            time = int(random.integers(places - len(child)))
            for used in sorted(child):  # the number of the unused time among all of them
                time += time >= used
            child[k] = time
    return tuple(sorted(child, reverse=True))


def _crossed(a: Times, b: Times, random: np.random.Generator) -> Times | None:
    """Each entry from one of two parents; None where a time comes twice."""
    child = {x if pick else y for x, y, pick in zip(a, b, random.random(len(a)) < 0.5, strict=True)}
    return tuple(sorted(child, reverse=True)) if len(child) == len(a) else None
