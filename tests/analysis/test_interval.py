"""Wilson's interval against its definition: the shares p whose score test at z does not reject the observed one."""

from __future__ import annotations

import pytest

from ldm_pipe import UsageError
from ldm_pipe.analysis.interval import wilson


@pytest.mark.parametrize(("right", "tried"), [(0, 10), (3, 10), (95, 100), (500, 500), (1, 1)])
def test_its_ends_are_rejected_just_so(right: int, tried: int) -> None:
    observed = right / tried
    for end in wilson(right, tried):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(observed - end) == pytest.approx(1.96 * (end * (1 - end) / tried) ** 0.5, abs=1e-9)
    low, high = wilson(right, tried)
    assert low <= observed + 1e-12
    assert high >= observed - 1e-12


@pytest.mark.parametrize(("right", "tried"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_shares_are_refused(right: int, tried: int) -> None:
    with pytest.raises(UsageError, match="wilson takes"):
        wilson(right, tried)
