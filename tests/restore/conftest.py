"""What the restoration tests share: the reference problem, its grid and its numbers, and a decoder that is a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, Noise, levels
from ldm_pipe.analysis import Closeness, closeness, outcome, reference_problem
from ldm_pipe.model import Denoiser
from ldm_pipe.restore.matrix import Matrix
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler

SHAPE = (2, 2, 2)
PATH = VP.linear()


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference problem in our nouns: the prior, what is measured of it, and the exact posterior."""

    prior: Gaussian
    measurement: Measurement
    posterior: Gaussian

    def judge(self, denoise: Denoiser, sampler: Sampler, walk: Sequence[Level]) -> Closeness:
        """W2 to the posterior, relative error of the mean, ratio of the traces."""
        return closeness(outcome(denoise, walk, sampler, SHAPE), (self.posterior.mean, self.posterior.covariance))


@pytest.fixture(scope="session")
def reference() -> Callable[[str, float], Reference]:
    """reference("pool2" | "mask4", deviation)."""

    def make(operator: str, deviation: float) -> Reference:
        problem = reference_problem(operator, deviation)  # type: ignore[arg-type]
        prior = Gaussian(problem.mean, problem.covariance)
        measurement = Measurement(Matrix(problem.operator, SHAPE), problem.y[None], deviation)
        return Reference(prior, measurement, prior.measured(problem.operator, problem.y, deviation))

    return make


@pytest.fixture(scope="session")
def grid() -> Callable[[int], list[Level]]:
    """grid(steps): range(0, T, T // steps) of the linear table, from the last to the first, then clean."""
    return lambda steps: levels.leading(PATH, steps, offset=0)


@pytest.fixture
def noise() -> Noise:
    """The noise of three images of eight values."""
    return Noise((5, 6, 7), SHAPE, dtype=torch.float64)


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """draw(*shape): standard normal numbers in float64, the same every time."""
    return lambda *shape: torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True, eq=False)
class MatrixCodec:
    """A decoder that is a matrix [D,d], and its pseudo-inverse as the encoder."""

    matrix: Tensor
    channels: int = 1
    factor: int = 1

    def encode(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ torch.linalg.pinv(self.matrix).T).unflatten(1, (-1, 1, 1))

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.flatten(1) @ self.matrix.T).unflatten(1, SHAPE)

    def raw(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device: torch.device, dtype: torch.dtype) -> MatrixCodec:
        return self


@pytest.fixture
def codec(draw: Callable[..., Tensor]) -> MatrixCodec:
    """Latents of five values, images of eight."""
    return MatrixCodec(draw(8, 5))
