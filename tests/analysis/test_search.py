"""The search over spacings: better than even times on an exact oracle, the same for a seed, nothing measured twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ldm_pipe import VP, Flow, Gaussian, UsageError, build, levels
from ldm_pipe.analysis import Search, gaussian_w2, outcome
from ldm_pipe.analysis.search import _crossed, _mutated, even, walk_of

INDEX = torch.arange(8, dtype=torch.float64)
PRIOR = Gaussian(INDEX.sin(), 0.9 ** (INDEX[:, None] - INDEX).abs())
PATH = VP.linear()


def distance(times: tuple[int, ...]) -> float:
    """W2 of what 4 DDIM steps make to the prior, exact."""
    found = outcome(PRIOR, walk_of(PATH, times), build("sampler", "ddim"), (2, 2, 2))
    return gaussian_w2(found, (PRIOR.mean, PRIOR.covariance))


def test_it_finds_a_better_walk_of_four_steps_than_the_even_ones() -> None:
    start = even(PATH, 4)
    assert start == [(999, 749, 499, 249), (999, 666, 333, 0)]
    found = Search(population=30, epochs=6, seed=1)(distance, 1000, start)
    assert found.fitness == distance(found.times)
    assert found.fitness < 0.75 * min(map(distance, start))
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.history[0] <= min(map(distance, start))
    assert list(found.times) == sorted(set(found.times), reverse=True)
    again = build("spacing", "file", values=tuple(map(float, found.times)), unit="time")(PATH, 4)
    assert again == walk_of(PATH, found.times)


def test_a_small_space_is_searched_to_its_end_and_nothing_twice() -> None:
    seen: list[tuple[int, ...]] = []

    def far(times: tuple[int, ...]) -> float:
        seen.append(times)
        return abs(times[0] - 7) + abs(times[1] - 3) + abs(times[2] - 2)

    found = Search(population=40, epochs=5)(far, 9, [(8, 4, 0)])
    assert found[:2] == ((7, 3, 2), 0.0)
    assert len(seen) == len(set(seen)) == found.measured == 84
    assert {tuple(sorted(c)) for c in seen} == set(itertools.combinations(range(9), 3))


def test_the_same_seed_finds_the_same() -> None:
    def rough(times: tuple[int, ...]) -> float:
        return sum((t * 7919) % 101 for t in times)

    small = {"population": 12, "keep": 3, "mutations": 6, "crossovers": 3, "epochs": 2}
    runs = [Search(**small, seed=s)(rough, 1000, [(900, 500, 20)]) for s in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]


def test_children_are_candidates() -> None:
    import numpy as np

    random = np.random.Generator(np.random.Philox(key=0))
    seen = set()
    for _ in range(300):
        child = _mutated((8, 5, 0), 10, 0.5, random)
        assert len(set(child)) == 3
        assert list(child) == sorted(child, reverse=True)
        seen |= set(child)
        crossed = _crossed((9, 5, 2), (8, 5, 1), random)
        assert crossed is not None
        assert (crossed[0] in (9, 8), crossed[1], crossed[2] in (2, 1)) == (True, 5, True)
    assert seen == set(range(10))
    assert _mutated((2, 1, 0), 3, 1.0, random) == (2, 1, 0)
    assert None in {_crossed((5, 4), (4, 3), random) for _ in range(20)}


def test_a_continuous_path_is_searched_in_thousandths() -> None:
    walk = walk_of(Flow(), (999, 499, 0))
    assert [lv.u for lv in walk] == pytest.approx([1.0, 0.5, 0.001, 0.0], abs=1e-3)
    assert [lv.u for lv in walk_of(Flow(), even(Flow(), 4)[0])] == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-3)
    assert walk_of(PATH, (999, 5)) == levels.at_times(PATH, [999, 5])


@pytest.mark.parametrize("first", [[], [(5, 5)], [(10, 1)], [(3, 2), (3,)], [(-1, 2)]])
def test_candidates_to_begin_with_are_checked(first: Any) -> None:
    with pytest.raises(UsageError, match="search begins with"):
        Search()(lambda c: 0.0, 10, first)


@pytest.mark.parametrize("fields", [{"keep": 0}, {"keep": 51}, {"chance": 0.0}, {"epochs": -1}])
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="search needs"):
        Search(**fields)
