"""Restart: the walk it makes, Heun's without it, rises that are q(x_t | x_s), and errors that it removes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import EDM, VP, Flow, Gaussian, Level, Noise, UsageError, levels, sample
from ldm_pipe.analysis import gaussian_w2, outcome, read_walk
from ldm_pipe.samplers.heun import Heun
from ldm_pipe.samplers.restart import Restart

Close = Callable[[Tensor, Tensor, float], None]


def test_without_restarts_it_is_heuns(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    assert Restart(times=0).walk(walk) == walk
    close(*(sample(prior, noise.start(), walk, s, noise) for s in (Restart(), Heun("ve"))), 1e-12)


def test_the_walk_goes_up_after_the_level_nearest_to_low() -> None:
    """Xu et al. 2023, algorithm 1: K times from t_min to t_max and down again by N_restart Karras steps."""
    plain = levels.karras(EDM(), 12)
    walk = Restart(times=3, low=0.06, high=0.30, inner=4).walk(plain)
    ratios = [lv.ratio for lv in walk]
    place = min(range(12), key=lambda k: abs(ratios[k] / 0.06 - 1))
    rises = [k for k, (a, b) in enumerate(pairwise(ratios)) if b > a]
    assert rises == [place, place + 5, place + 10]
    bottom = ratios[place]
    roots = [(0.30 ** (1 / 7) + k / 4 * (bottom ** (1 / 7) - 0.30 ** (1 / 7))) ** 7 for k in range(5)]
    for k in rises:
        assert ratios[k + 1 : k + 6] == pytest.approx(roots)
    assert walk[: place + 1] == plain[: place + 1]
    assert walk[-(12 - place) :] == plain[place + 1 :]


def test_a_walk_that_does_not_come_near_is_left_alone() -> None:
    walk = [Level(0.0, 1.0), Level(0.9, 0.01), Level(1.0, 0.0)]
    assert Restart().walk(walk) == walk


def test_a_rise_is_a_draw_from_the_forward_process(prior: Gaussian) -> None:
    """What is distributed as the marginal of the lower level is then distributed as that of the higher, exactly."""
    for here, there in ((Level(0.9, 0.1), Level(0.5, 0.7)), (Level(1.0, 0.2), Level(0.3, 0.3))):
        mean, covariance = here.alpha * prior.mean, here.alpha**2 * prior.covariance + here.sigma**2 * torch.eye(8)
        got = read_walk(prior, [here, there], Restart(), (2, 2, 2)).carry(mean, covariance)
        right = there.alpha * prior.mean, there.alpha**2 * prior.covariance + there.sigma**2 * torch.eye(8).double()
        assert gaussian_w2(got, right) < 1e-7


def test_restarts_remove_what_a_coarse_walk_got_wrong(prior: Gaussian) -> None:
    """The error of 6 coarse steps shrinks with every restart, down to that of the fine descents."""
    plain = [Flow().level(1000 * u) for u in (0.99, 0.9, 0.75, 0.6, 0.4, 0.1)]
    right = plain[-1].alpha * prior.mean, plain[-1].alpha ** 2 * prior.covariance + plain[-1].sigma ** 2 * torch.eye(8).double()
    errors = []
    for times in (0, 1, 4):
        sampler = Restart(times, low=plain[-1].ratio, high=3.0, inner=24)
        errors.append(gaussian_w2(outcome(prior, sampler.walk(plain), sampler, (2, 2, 2)), right))
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


@pytest.mark.parametrize("fields", [{"times": -1}, {"inner": 0}, {"low": 0.0}, {"low": 3.0}, {"rho": 0.0}])
def test_fields_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="restart"):
        Restart(**fields)
