"""The walk: what trajectory yields, what it refuses, when memory restarts, and that grad mode does not leak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ldm_pipe import CLEAN, Gaussian, Level, Noise, UsageError, sample, trajectory
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import NoNoise, StepNoise
from ldm_pipe.samplers.euler import Euler
from ldm_pipe.walk import Sampler, Step

PRIOR = Gaussian.isotropic(torch.zeros(1, 2, 2), 0.5)
NOISE = Noise((0, 1), (1, 2, 2), dtype=torch.float64)
WALK = [Level(0.0, 1.0), Level(0.6, 0.4), Level(0.9, 0.1), CLEAN]


@dataclass(frozen=True)
class Remembers(Sampler):
    """Counts its steps in its memory and returns the noise that it drew."""

    travels: ClassVar[bool] = True

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        return Step(noise("step"), denoise(x, here), (memory or 0) + 1)


class Stays(Remembers):
    travels: ClassVar[bool] = False


def test_a_step_says_where_it_went() -> None:
    x = NOISE.start()
    steps = list(trajectory(PRIOR, x, WALK, Euler(), NOISE))
    assert [(s.here, s.there, s.number) for s in steps] == [(WALK[i], WALK[i + 1], i) for i in range(3)]
    assert torch.equal(steps[0].estimate.x0, PRIOR(x, WALK[0]).x0)
    assert torch.equal(steps[1].estimate.x0, PRIOR(steps[0].x, WALK[1]).x0)
    assert torch.equal(sample(PRIOR, x, WALK, Euler(), NOISE), steps[-1].x)


def test_each_step_has_noise_of_its_own_index() -> None:
    steps = list(trajectory(PRIOR, NOISE.start(), WALK, Stays(), NOISE))
    assert all(torch.equal(s.x, NOISE.at(i)("step")) for i, s in enumerate(steps))


def test_memory_is_handed_on_and_restarts_where_the_levels_rise() -> None:
    walk = [WALK[0], WALK[1], WALK[2], WALK[1], WALK[2], CLEAN]
    assert [s.memory for s in trajectory(PRIOR, NOISE.start(), walk, Remembers(), NOISE)] == [1, 2, 1, 2, 3]


def test_a_clean_level_may_be_left_only_upwards() -> None:
    up = [Level(0.6, 0.4), CLEAN, Level(0.6, 0.4), CLEAN]
    assert len(list(trajectory(PRIOR, NOISE.start(), up[:3], Remembers(), NOISE))) == 2
    with pytest.raises(UsageError, match="level 1 is clean already"):
        list(trajectory(PRIOR, NOISE.start(), [WALK[0], CLEAN, CLEAN], Euler(), NOISE))


def test_a_rise_is_refused_unless_the_sampler_travels() -> None:
    with pytest.raises(UsageError, match="Stays does not travel: level 2 has more noise than level 1"):
        list(trajectory(PRIOR, NOISE.start(), [WALK[0], WALK[2], WALK[1]], Stays(), NOISE))


def test_a_level_of_more_noise_on_another_path_is_no_rise() -> None:
    """Where a level lies is its u: (0.9, 0.9) has a larger sigma than (0.3, 0.7) but less noise."""
    list(trajectory(PRIOR, NOISE.start(), [Level(0.3, 0.7), Level(0.9, 0.9)], Euler(), NOISE))


@pytest.mark.parametrize("walk", [[], [CLEAN], WALK[:1]])
def test_a_walk_needs_two_levels(walk: list[Level]) -> None:
    with pytest.raises(UsageError, match="at least two levels"):
        list(trajectory(PRIOR, NOISE.start(), walk, Euler(), NOISE))


@pytest.mark.parametrize("grad", [True, False])
def test_no_gradients_inside_and_the_callers_mode_between(grad: bool) -> None:
    inside = []

    def denoise(x: Tensor, level: Level) -> Any:
        inside.append(torch.is_grad_enabled())
        return PRIOR(x, level)

    with torch.set_grad_enabled(grad):
        for _ in trajectory(denoise, NOISE.start().requires_grad_(), WALK, Euler(), NOISE):
            assert torch.is_grad_enabled() == grad
        assert torch.is_grad_enabled() == grad
    assert inside == [False] * 3


def test_a_walk_can_be_left_early_and_is_lazy() -> None:
    calls = []

    def denoise(x: Tensor, level: Level) -> Any:
        calls.append(level)
        return PRIOR(x, level)

    next(iter(trajectory(denoise, NOISE.start(), WALK, Euler(), NOISE)))
    assert calls == WALK[:1]


def test_no_noise_is_zero_at_every_step() -> None:
    like = NOISE.start()
    steps = list(trajectory(PRIOR, like, WALK, Stays(), NoNoise(like)))
    assert all(torch.equal(s.x, torch.zeros_like(like)) for s in steps)


def test_the_base_sampler_has_no_step_and_says_so() -> None:
    with pytest.raises(TypeError, match="Sampler has no step"):
        list(trajectory(PRIOR, NOISE.start(), WALK, Sampler(), NOISE))


def test_what_a_wrapping_sampler_costs_follows_from_what_it_wraps() -> None:
    """Calls, start, walk and memory are the wrapped one's; it travels where that one does, and climbs without asking."""
    from ldm_pipe.samplers.heun import Heun
    from ldm_pipe.walk import Wrapping, climb

    @dataclass(frozen=True)
    class Bare(Wrapping):
        sampler: Sampler

    x = NOISE.start()
    for inner in (Euler(), Heun(), Remembers(), Stays()):
        assert (Bare(inner).calls, Bare(inner).travels) == (inner.calls, inner.travels)
        assert torch.equal(Bare(inner).start(x, Level(0.3, 0.8)), inner.start(x, Level(0.3, 0.8)))
        assert Bare(inner).walk(WALK) == inner.walk(WALK) == WALK
    plain, wrapped = (list(trajectory(PRIOR, x, WALK[1:], s, NOISE)) for s in (Remembers(), Bare(Remembers())))
    assert [s.memory for s in wrapped] == [s.memory for s in plain] == [1, 2]
    up = next(iter(trajectory(PRIOR, x, [WALK[2], WALK[1]], Bare(Remembers()), NOISE)))
    assert torch.equal(up.x, climb(x, WALK[2], WALK[1], NOISE.at(0)("climb")))
    assert up.memory is None
    with pytest.raises(UsageError, match="Bare does not travel"):
        list(trajectory(PRIOR, x, [WALK[2], WALK[1]], Bare(Stays()), NOISE))
