"""Conditions are batches: rows are repeated, taken, moved and joined; nothing is joined that does not fit."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import Cond, UsageError


def cond(rows: int = 2, first: float = 0.0) -> Cond:
    base = first + torch.arange(rows, dtype=torch.float32)
    return Cond(
        tokens=base[:, None, None].expand(rows, 3, 4),
        pooled=base[:, None].expand(rows, 5),
        mask=torch.ones(rows, 3, dtype=torch.bool),
        extras={"size": base[:, None]},
    )


def rows_of(c: Cond) -> list[list[float]]:
    assert c.tokens is not None
    assert c.pooled is not None
    return [t.reshape(len(t), -1)[:, 0].tolist() for t in (c.tokens, c.pooled, c.extras["size"])]


def test_repeat_keeps_the_copies_of_a_row_together() -> None:
    assert rows_of(cond().repeat(3)) == [[0, 0, 0, 1, 1, 1]] * 3
    assert cond().repeat(3).rows == 6


def test_take_and_cat_are_inverse() -> None:
    whole = cond(5)
    assert rows_of(whole.take([3, 0])) == [[3, 0]] * 3
    assert rows_of(whole.take(slice(1, 3))) == [[1, 2]] * 3
    assert rows_of(Cond.cat([whole.take(slice(0, 2)), whole.take([2, 3, 4])])) == rows_of(whole)
    assert rows_of(Cond.cat([cond(2), cond(1, 7.0)])) == [[0, 1, 7]] * 3
    only = cond()
    assert Cond.cat([only]) is only


def test_to_casts_what_is_floating_point() -> None:
    moved = cond().to("cpu", torch.float16)
    assert moved.tokens is not None
    assert moved.mask is not None
    assert moved.tokens.dtype == moved.extras["size"].dtype == torch.float16
    assert moved.mask.dtype == torch.bool


def test_what_is_absent_stays_absent() -> None:
    assert Cond().rows == 0
    assert Cond().repeat(2).tokens is None
    assert Cond(extras={"a": torch.ones(4)}).rows == 4


@pytest.mark.parametrize("other", [Cond(tokens=torch.ones(1, 3, 4)), cond().map(lambda t: t), Cond()])
def test_conditions_that_differ_do_not_share_a_batch(other: Cond) -> None:
    if other.pooled is not None:
        other = Cond(other.tokens, other.pooled, other.mask, extras={"other": torch.ones(2, 1)})
    with pytest.raises(UsageError, match="different tensors"):
        Cond.cat([cond(), other])


def test_conditions_of_other_lengths_are_refused() -> None:
    with pytest.raises(UsageError, match="different shapes"):
        Cond.cat([Cond(tokens=torch.ones(1, 3, 4)), Cond(tokens=torch.ones(1, 5, 4))])
