"""The closed-form denoiser against Tweedie's formula by autograd, its flow against its ODE, its density with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ldm_pipe import CLEAN, Gaussian, Level
from ldm_pipe.analysis.gaussian import log_density

SPAN = torch.arange(6, dtype=torch.float64)
PRIOR = Gaussian(torch.sin(SPAN), 0.3 * 0.7 ** (SPAN[:, None] - SPAN).abs() + torch.diag(SPAN / 10))
X = torch.randn(4, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
LEVELS = [Level(0.6, 0.8), Level(0.5, 0.5), Level(1.0, 3.0), Level(2.0, 0.1)]


def score(x: Tensor, level: Level) -> Tensor:
    """The gradient of log p(x) at the level, by autograd through torch's own density."""
    a, s = level
    eye = torch.eye(6, dtype=torch.float64)
    density = MultivariateNormal(a * PRIOR.mean, a * a * PRIOR.covariance + s * s * eye)
    flat = x.reshape(len(x), -1).clone().requires_grad_()
    return torch.autograd.grad(density.log_prob(flat).sum(), flat)[0].reshape(x.shape)


@pytest.mark.parametrize("level", LEVELS)
def test_is_tweedies_formula(level: Level) -> None:
    """x0 = (x + sigma^2 score) / alpha and noise = -sigma score."""
    a, s = level
    found, gradient = PRIOR(X, level), score(X, level)
    assert torch.allclose(found.x0, (X + s * s * gradient) / a, atol=1e-10)
    assert torch.allclose(found.noise, -s * gradient, atol=1e-10)
    assert torch.allclose(level.mix(found.x0, found.noise), X, atol=1e-12)


def test_both_ends() -> None:
    pure = PRIOR(X, Level(0.0, 2.0))
    assert torch.allclose(pure.x0, PRIOR.mean.reshape(1, 2, 3).expand_as(X))
    assert torch.allclose(pure.noise, X / 2)
    clean = PRIOR(X, Level(2.0, 0.0))
    assert torch.allclose(clean.x0, X / 2)
    assert torch.equal(clean.noise, torch.zeros_like(X))
    point = Gaussian.isotropic(PRIOR.mean, 0.0)(X, Level(2.0, 0.0))  # a covariance that has no inverse
    assert torch.allclose(point.x0, X / 2)
    assert torch.equal(point.noise, torch.zeros_like(X))


def test_keeps_the_dtype_of_x() -> None:
    assert PRIOR(X.float(), LEVELS[0]).x0.dtype == torch.float32
    assert torch.allclose(PRIOR(X.float(), LEVELS[0]).x0.double(), PRIOR(X, LEVELS[0]).x0, atol=1e-6)


@pytest.mark.parametrize("there", [*LEVELS[1:], CLEAN])
def test_the_flow_carries_the_marginals(there: Level) -> None:
    """x ~ N(a m, a^2 C + s^2 I) becomes the same at the other level: the map is affine, so its matrix says it all."""
    here = LEVELS[0]
    eye = torch.eye(6, dtype=torch.float64)
    offset = PRIOR.flow(torch.zeros(1, 1, 2, 3).double(), here, there).reshape(6)
    matrix = (PRIOR.flow(eye.reshape(6, 1, 2, 3), here, there).reshape(6, 6) - offset).T
    before, after = (lv.alpha**2 * PRIOR.covariance + lv.sigma**2 * eye for lv in (here, there))
    assert torch.allclose(matrix @ (here.alpha * PRIOR.mean) + offset, there.alpha * PRIOR.mean)
    assert torch.allclose(matrix @ before @ matrix.T, after)


def test_the_flow_is_the_probability_flow_ode() -> None:
    """In (1 - u, u) coordinates dx/du is noise - x0 (Liu et al. 2022); and two flows in a row are one."""
    u, h = 0.4, 1e-4
    ends = [PRIOR.flow(X, Level(1 - u, u), Level(1 - u - d, u + d)) for d in (h, -h)]
    x0, noise, _ = PRIOR(X, Level(1 - u, u))
    assert torch.allclose((ends[0] - ends[1]) / (2 * h), noise - x0, atol=1e-6)
    middle = PRIOR.flow(PRIOR.flow(X, LEVELS[0], LEVELS[1]), LEVELS[1], LEVELS[2])
    assert torch.allclose(middle, PRIOR.flow(X, LEVELS[0], LEVELS[2]))


def test_isotropic() -> None:
    round_ = Gaussian.isotropic(torch.ones(1, 2, 3), 0.5)
    assert torch.equal(round_.mean, torch.ones(6).double())
    assert torch.equal(round_.covariance, 0.25 * torch.eye(6).double())


def test_log_density() -> None:
    expected = MultivariateNormal(PRIOR.mean, PRIOR.covariance).log_prob(X.reshape(4, 6))
    assert torch.allclose(log_density(PRIOR, X), expected)
