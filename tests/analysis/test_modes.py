"""Mode fractions: on points placed by hand, on exact quantiles carried down the flow, and on whole walks of the samplers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ldm_pipe import VP, Level, Mixture, UsageError, levels, sample
from ldm_pipe.analysis import mode_fractions
from ldm_pipe.noise import NoNoise, StepNoise
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.heun import Heun

WEIGHTS = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
MODES = Mixture.isotropic(WEIGHTS, torch.tensor([[-1.5, 0.0], [1.0, 1.0], [1.0, -1.0]]), 0.2)


def test_points_placed_by_hand() -> None:
    """Images of any shape; ties go to one mode; what is too far from all of them is lost, and all adds up to 1."""
    x = torch.tensor([[0.1, 0.0], [0.0, 0.3], [2.1, 0.0], [9.0, 9.0]]).reshape(4, 1, 2)
    centres = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[-5.0, 0.0]]])
    shares, lost = mode_fractions(x, centres)
    assert shares.tolist() == [0.5, 0.5, 0.0]
    assert lost == 0
    shares, lost = mode_fractions(x, centres, radius=0.2)
    assert shares.tolist() == [0.25, 0.25, 0.0]
    assert lost == 0.5
    with pytest.raises(UsageError, match="at least one"):
        mode_fractions(x[:0], centres)


def test_draws_of_the_mixture_and_of_its_classes() -> None:
    for mixture in (MODES, MODES.given(torch.tensor([0.0, 1.0, 0.5]).double())):
        shares, lost = mode_fractions(mixture.draw(20000), MODES.means, radius=1.2)  # six deviations
        assert bool(((shares - mixture.weights).abs() <= 5 * (mixture.weights * (1 - mixture.weights) / 20000).sqrt()).all())
        assert lost < 5e-4


def test_the_flow_carries_quantiles_to_quantiles() -> None:
    """In one dimension the probability flow keeps order, so the quantiles of x at any level become those of x0: the cumulative
    distribution of the mixture at the ends is the even grid, without any Monte Carlo."""
    means, deviation, count = torch.tensor([-1.0, 0.2, 1.4], dtype=torch.float64), 0.15, 400
    mixture = Mixture.isotropic(WEIGHTS, means[:, None], deviation)

    def cumulative(x: Tensor, level: Level) -> Tensor:
        spread = (level.alpha**2 * deviation**2 + level.sigma**2) ** 0.5
        return Normal(level.alpha * means, spread).cdf(x[:, None]) @ WEIGHTS

    walk = [VP.linear().rescale(Level(1.0, r))[1] for r in torch.logspace(2, -2.5, 300).double().tolist()]
    grid = (torch.arange(count) + 0.5).double() / count
    low, high = torch.full_like(grid, -9.0), torch.full_like(grid, 9.0)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = cumulative(middle, walk[0]) < grid
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    x = ((low + high) / 2)[:, None]
    end = sample(mixture, x, walk, Heun("x0"), NoNoise(x))
    assert float((cumulative(end[:, 0], walk[-1]) - grid).abs().max()) < 2e-3
    shares, _ = mode_fractions(end, means[:, None])
    assert float((shares - WEIGHTS).abs().max()) < 2 / count


@dataclass(frozen=True)
class Draws:
    """Normal draws for a large batch, one stream per step."""

    like: Tensor

    def at(self, index: int) -> StepNoise:
        def draw(tag: str = "step") -> Tensor:
            return torch.from_numpy(np.random.Generator(np.random.Philox(key=index)).standard_normal(self.like.shape))

        return draw


@pytest.mark.parametrize("conditional", [False, True])
def test_ancestral_sampling_visits_every_mode_as_often_as_it_should(conditional: bool) -> None:
    """A measurement of the first value cannot tell the two right modes apart: of .3, .4, .3 it leaves 0, 4/7, 3/7. 20,000
    draws in 100 steps, within five standard errors (0.017)."""
    measured = MODES.measured(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([1.0]).double(), 0.1)
    assert torch.allclose(measured.weights, torch.tensor([0.0, 4 / 7, 3 / 7]).double(), atol=1e-9)
    right = measured if conditional else MODES
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(key=1000)).standard_normal((20000, 2)))
    x = sample(right, noise, levels.leading(VP.linear(), 100, offset=0), DDPM("small"), Draws(noise))
    shares, lost = mode_fractions(x, MODES.means, radius=1.2)
    assert bool(((shares - right.weights).abs() <= 1e-9 + 5 * (right.weights * (1 - right.weights) / 20000).sqrt()).all())
    assert lost < 1e-3
    assert float((right.responsibilities(x).mean(0) - right.weights).abs().max()) < 0.02
