"""EDM's stochastic Heun: Heun's without churn, algorithm 2 with it, and no churn outside its interval."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.edm_churn import Churn
from ldm_pipe.samplers.heun import Heun

Close = Callable[[Tensor, Tensor, float], None]


def test_without_churn_it_is_heuns(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    close(*(sample(prior, noise.start(), walk, s, noise) for s in (Churn(gamma=0.0), Heun("ve"))), 1e-12)


def test_a_step_is_algorithm_two(prior: Gaussian, noise: Noise, close: Close) -> None:
    """Karras et al. 2022, lines 4 to 11, in y = x / alpha."""
    sampler, here, there, x = Churn(0.2, s_noise=1.1), Level(0.5, 0.8), Level(0.7, 0.6), noise.start()
    t, t_next = here.ratio, there.ratio
    t_hat = t + 0.2 * t
    y = x / here.alpha + (t_hat**2 - t**2) ** 0.5 * 1.1 * noise.at(4)("step")

    def slope(y: Tensor, sigma: float) -> Tensor:
        return (y - prior(y, Level(1.0, sigma)).x0) / sigma

    d = slope(y, t_hat)
    end = y + (t_next - t_hat) * d
    end = y + (t_next - t_hat) * (d + slope(end, t_next)) / 2
    close(sampler.step(prior, x, here, there, None, noise.at(4)).x, there.alpha * end, 1e-12)


@pytest.mark.parametrize(("ratio", "drawn"), [(0.49, False), (0.5, True), (2.0, True), (2.01, False)])
def test_noise_is_added_within_the_interval_only(prior: Gaussian, noise: Noise, ratio: float, drawn: bool) -> None:
    here, there, x = Level(1.0, ratio), Level(1.0, 0.3), noise.start()
    sampler = Churn(s_min=0.5, s_max=2.0)
    ends = [sampler.step(prior, x, here, there, None, noise.at(i)).x for i in (0, 1)]
    assert torch.equal(*ends) is not drawn
