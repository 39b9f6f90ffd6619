"""What the sampler tests share: a closed-form prior, orders measured on it, and tables read from diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, sample
from ldm_pipe.walk import Sampler


@pytest.fixture(scope="session")
def prior() -> Gaussian:
    """Eight correlated values with a mean, as images of [2,2,2]. The closed-form denoiser of float64."""
    index = torch.arange(8, dtype=torch.float64)
    return Gaussian(torch.sin(index), 0.9 ** (index[:, None] - index).abs())


@pytest.fixture
def noise() -> Noise:
    """The noise of three such images."""
    return Noise((5, 6, 7), (2, 2, 2), dtype=torch.float64)


@pytest.fixture
def order(prior: Gaussian, noise: Noise) -> Callable[[Sampler], float]:
    """order(sampler): the power of the step size by which the error at a positive end level falls."""

    def walk(count: int) -> list[Level]:
        ends = [math.log((1 - u) / u) for u in (0.97, 0.02)]  # even steps of log(alpha / sigma)
        places = [ends[0] + (ends[1] - ends[0]) * i / count for i in range(count + 1)]
        return [VP.linear().rescale(Level(1.0, math.exp(-p)))[1] for p in places]

    def error(sampler: Sampler, count: int) -> float:
        levels = walk(count)
        x = noise.start()
        exact = prior.flow(x, levels[0], levels[-1])
        return float((sample(prior, x, levels, sampler, noise) - exact).abs().max())

    return lambda sampler: math.log2(error(sampler, 40) / error(sampler, 80))


@pytest.fixture
def table() -> Callable[[Any], VP]:
    """table(scheduler): our path with the numbers of a diffusers scheduler, whose own table is turned to float64."""

    def path(scheduler: Any) -> VP:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        return VP(tuple(scheduler.alphas_cumprod.tolist()))

    return path


@pytest.fixture
def close() -> Callable[..., None]:
    """close(a, b, within): largest difference against the largest value of b."""

    def check(a: Tensor, b: Tensor, within: float) -> None:
        assert a.shape == b.shape
        assert float((a.double() - b.double()).abs().max() / b.double().abs().max()) < within

    return check
