"""Output distributions by affine propagation: on a Gaussian a step is x -> F x + f + G z, read off unit vectors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Gaussian, Level, levels
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import Sampler, trajectory

D = 8
INDEX = torch.arange(D, dtype=torch.float64)
COVARIANCE = 0.9 ** (INDEX[:, None] - INDEX).abs()


class Units:
    """Noise for the rows of one step: none for the first D + 1, the unit vectors for the last D."""

    def at(self, index: int) -> object:
        return lambda tag="step": torch.cat([torch.zeros(D + 1, D), torch.eye(D)]).double()


def propagate(prior: Gaussian, sampler: Sampler, walk: list[Level]) -> tuple[Tensor, Tensor]:
    """Mean and covariance after the walk, from x ~ N(0, I) at its first level."""
    mean, covariance = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    rows = torch.cat([torch.zeros(1, D), torch.eye(D), torch.zeros(D, D)]).double()
    for here, there in pairwise(walk):
        x = next(iter(trajectory(prior, rows, [here, there], sampler, Units()))).x  # type: ignore[arg-type]
        offset, f, g = x[0], (x[1 : D + 1] - x[0]).T, (x[D + 1 :] - x[0]).T
        mean, covariance = f @ mean + offset, f @ covariance @ f.T + g @ g.T
    return mean, covariance


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def wasserstein(mean: Tensor, covariance: Tensor, prior: Gaussian) -> float:
    """W2^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2)."""
    a, b = covariance.numpy(), prior.covariance.numpy()
    half = root(b)
    square = float((mean - prior.mean).square().sum()) + np.trace(a + b - 2 * root(half @ a @ half))
    return float(max(square, 0.0)) ** 0.5


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [
        (DDPM("small"), 1000, 0.0127),
        (DDPM("large"), 1000, 0.0043),
        (DDIM(0.0), 10, 0.472),
        (DDIM(0.0), 50, 0.103),
        (DDIM(0.0), 1000, 0.0057),
        (DDIM(1.0), 50, 0.197),
        (DDPM("small"), 50, 0.197),
    ],
)
def test_the_distance_to_the_prior_on_the_reference_problem(sampler: Sampler, steps: int, expected: float) -> None:
    """C_ij = 0.9^|i-j|, linear betas, T = 1000, the grid range(0, T, T // S)."""
    prior = Gaussian(torch.zeros(D, dtype=torch.float64), COVARIANCE)
    walk = levels.leading(VP.linear(), steps, offset=0)
    digits = 10 ** np.floor(np.log10(expected)) / (100 if expected > 0.1 else 10)
    assert wasserstein(*propagate(prior, sampler, walk), prior) == pytest.approx(expected, abs=0.51 * digits)


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(0.4), DDIM(1.0), DDPM("small"), DDPM("large"), Renoise(0.85)])
def test_the_mean_is_exact_from_pure_noise(sampler: Sampler) -> None:
    """At every number of steps and every eta: the tower property. Only the covariance carries the steps' error."""
    prior = Gaussian(torch.sin(INDEX), COVARIANCE)
    walk = levels.trailing(VP.cosine().zero_terminal(), 20)
    mean, _ = propagate(prior, sampler, walk)
    assert float((mean - prior.mean).abs().max()) < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_equals_an_independent_recursion(eta: float) -> None:
    """DDIM's mean and covariance from the betas alone, in numpy: no level, no denoiser, no sampler of ours."""
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    times = [*range(0, 1000, 25)][::-1]
    c, m = COVARIANCE.numpy(), np.sin(np.arange(D))
    mean, covariance, eye = np.zeros(D), np.eye(D), np.eye(D)
    for t, s in zip(times, [*times[1:], -1], strict=True):
        a, b = bars[t], bars[s] if s >= 0 else 1.0
        gain = np.sqrt(a) * c @ np.linalg.inv(a * c + (1 - a) * eye)
        fresh = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        to_x0, to_eps = np.sqrt(b), np.sqrt(max(1 - b - fresh, 0))
        eps = (eye - np.sqrt(a) * gain) / np.sqrt(1 - a)
        f = to_x0 * gain + to_eps * eps
        still = m - np.sqrt(a) * gain @ m  # x0 of x = 0
        offset = to_x0 * still - to_eps * np.sqrt(a) * still / np.sqrt(1 - a)
        mean, covariance = f @ mean + offset, f @ covariance @ f.T + fresh * eye
    ours = propagate(Gaussian(torch.from_numpy(m), COVARIANCE), DDIM(eta), levels.leading(VP.linear(), 40, offset=0))
    assert np.abs(ours[0].numpy() - mean).max() < 1e-9
    assert np.abs(ours[1].numpy() - covariance).max() < 1e-9
