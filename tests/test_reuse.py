"""What is kept of a module: since which step, of which branches, of which images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level
from ldm_pipe.reuse import Reuse

BOTH, ONE = ("cond", "uncond"), ("uncond",)
Call = tuple[int, tuple[str, ...], tuple[int, ...]]


def answers(keys: tuple[int, ...], calls: list[Call]) -> list[Any]:
    """Where each answer was computed, call number by call number, and its rows; step k has alpha = k / 10."""
    change = Reuse(lambda level: round(float(level.alpha) * 10), keys).changes(["layer"])["layer"]
    found = []
    for number, (step, branches, counts) in enumerate(calls):
        value = torch.cat([torch.full((2,), 10.0 * BOTH.index(b)) for b in branches]) + 100 * number
        token = ROWS.set(Rows(branches, 2, Level(step / 10, 1.0), counts))
        out: Tensor = change(lambda value=value: (value, (value,)))[1][0]
        ROWS.reset(token)
        found.append((int(out[0] // 100), [int(v % 100) for v in out]))
    return found


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([(0, BOTH, ()), (1, BOTH, ()), (2, BOTH, ()), (3, BOTH, ()), (4, BOTH, ())], [0, 0, 0, 3, 3]),
        ([(0, BOTH, ()), (0, BOTH, ()), (1, BOTH, ())], [0, 1, 1]),  # a key is computed every time it is met
        ([(3, BOTH, ()), (1, BOTH, ()), (2, BOTH, ())], [0, 1, 1]),  # a journey back does not see the steps after it
        ([(0, BOTH, ()), (4, BOTH, ()), (5, BOTH, ())], [0, 1, 1]),  # nor what is older than its own key
        ([(0, ONE, ()), (1, BOTH, ()), (2, BOTH, ())], [0, 1, 1]),  # a branch that was not kept
        ([(0, BOTH, (2, 1)), (1, BOTH, (2, 1)), (2, BOTH, ())], [0, 1, 2]),  # counts do not say which images they are
    ],
)
def test_where_an_answer_is_from(calls: list[Call], expected: list[int]) -> None:
    assert [where for where, _ in answers((0, 3), calls)] == expected


def test_one_branch_of_two_is_that_ones_rows() -> None:
    assert answers((0,), [(0, BOTH, ()), (1, ONE, ()), (2, ("uncond", "cond"), ())])[1:] == [(0, [10, 10]), (0, [10, 10, 0, 0])]
