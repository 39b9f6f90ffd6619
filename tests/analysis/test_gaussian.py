"""The closed-form denoiser against Tweedie's formula by autograd, its posteriors against the joint Gaussian of everything, its
flow against its ODE, its density with torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from ldm_pipe import CLEAN, Gaussian, Level, UsageError

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


@pytest.mark.parametrize("level", [CLEAN, *LEVELS])
def test_density_and_score(level: Level) -> None:
    """With torch's own, at every level; the clean one too, where the covariance has an inverse."""
    eye = torch.eye(6, dtype=torch.float64)
    law = MultivariateNormal(level.alpha * PRIOR.mean, level.alpha**2 * PRIOR.covariance + level.sigma**2 * eye)
    assert torch.allclose(PRIOR.log_density(X, level), law.log_prob(X.reshape(4, 6)), atol=1e-10)
    assert torch.allclose(PRIOR.score(X, level), score(X, level), atol=1e-10)


OPERATOR = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0.5, 0, 0, -1], [0, 1, 0, 2, 0, 0]], dtype=torch.float64)
Y = torch.tensor([0.7, -1.0, 2.0], dtype=torch.float64)


def conditioned(level: Level, deviation: float) -> tuple[Tensor, Tensor]:
    """E[x0 | x, y] of every row of X and the covariance, from the precision matrix of one joint Gaussian over x0 given both."""
    a, s = level
    precision = PRIOR.covariance.inverse() + (a / s) ** 2 * torch.eye(6) + OPERATOR.T @ OPERATOR / deviation**2
    pull = PRIOR.covariance.inverse() @ PRIOR.mean + a / s**2 * X.reshape(4, 6) + OPERATOR.T @ Y / deviation**2
    return pull @ precision.inverse(), precision.inverse()


@pytest.mark.parametrize("level", LEVELS)
def test_the_posterior_is_the_conditional_of_the_joint(level: Level) -> None:
    """By adding precisions, where the code updates with Kalman's gain."""
    mean, covariance = conditioned(level, 0.2)
    found = PRIOR.measured(OPERATOR, Y, 0.2)
    assert torch.allclose(found(X, level).x0.reshape(4, 6), mean, atol=1e-10)
    assert torch.allclose(found.posterior(level), covariance, atol=1e-10)
    jacobian = level.sigma**2 / level.alpha * found.gain(level)  # Tweedie's formula of the second order
    assert torch.allclose(found.posterior(level), jacobian, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS)
def test_a_measurement_is_exact_guidance(level: Level) -> None:
    """grad log p(y | x) = J' A' (A C_0|t A' + d^2 I)^-1 (y - A x0), by formula, by autograd, by a difference of scores."""
    d = 0.2
    of_y = OPERATOR @ PRIOR.posterior(level) @ OPERATOR.T + d * d * torch.eye(3)
    x = X.clone().requires_grad_()
    left = Y - PRIOR(x, level).x0.reshape(4, 6) @ OPERATOR.T
    by_formula = torch.linalg.solve(of_y, left.detach().T).T @ OPERATOR @ PRIOR.gain(level)
    by_autograd = torch.autograd.grad(MultivariateNormal(torch.zeros(3).double(), of_y).log_prob(left).sum(), x)[0]
    measured = PRIOR.measured(OPERATOR, Y, d)
    found = measured.score(X, level) - PRIOR.score(X, level)
    assert torch.allclose(found, by_autograd, atol=1e-10)
    assert torch.allclose(found.reshape(4, 6), by_formula, atol=1e-10)
    assert torch.allclose(measured(X, level).x0, PRIOR(X, level).x0 + level.sigma**2 / level.alpha * found, atol=1e-10)


def test_a_measurement_without_noise_is_met() -> None:
    """A x0 = y for every draw; the limit of small noise; a flow to the clean end that is finite, on a singular covariance."""
    exact = PRIOR.measured(OPERATOR, Y, 0.0)
    assert torch.allclose(OPERATOR @ exact.mean, Y)
    assert torch.allclose(exact.draw(5) @ OPERATOR.T, Y.expand(5, 3), atol=1e-7)
    near = PRIOR.measured(OPERATOR, Y, 1e-5)
    assert torch.allclose(near.mean, exact.mean, atol=1e-8)
    assert torch.allclose(near.covariance, exact.covariance, atol=1e-8)
    assert torch.allclose(exact(X, LEVELS[0]).x0.reshape(4, 6) @ OPERATOR.T, Y.expand(4, 3))
    end = exact.flow(X, Level(0.0, 1.0), CLEAN)
    assert torch.allclose(end.reshape(4, 6) @ OPERATOR.T, Y.expand(4, 3), atol=1e-7)
    assert torch.allclose(exact.flow(end, CLEAN, CLEAN), end, atol=1e-7)
    for refused in (exact.score, exact.log_density):
        with pytest.raises(UsageError, match="no density"):
            refused(X, CLEAN)


def test_a_linear_decoder_commutes_with_a_measurement() -> None:
    """Measuring D z through A is measuring z through A D: posterior, and denoiser under an orthonormal D."""
    decoder = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, y = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), Y
    pixels = PRIOR.mapped(decoder, torch.ones(8).double()).measured(a, y, 0.3)
    latents = PRIOR.measured(a @ decoder, y - a.sum(1), 0.3).mapped(decoder, torch.ones(8).double())
    assert torch.allclose(pixels.mean, latents.mean, atol=1e-10)
    assert torch.allclose(pixels.covariance, latents.covariance, atol=1e-10)
    turn = torch.linalg.qr(decoder)[0]
    level, z = LEVELS[0], X.reshape(4, 6)
    assert torch.allclose(PRIOR.mapped(turn)(z @ turn.T, level).x0, PRIOR(z, level).x0 @ turn.T, atol=1e-10)


def test_a_level_may_be_one_of_every_row() -> None:
    own = [*LEVELS[:2], Level(0.0, 1.0), Level(2.0, 0.0)]
    column = Level(*(torch.tensor(side, dtype=torch.float64).reshape(4, 1, 1, 1) for side in zip(*own, strict=True)))
    found = PRIOR(X, column)
    for i, level in enumerate(own):
        single = PRIOR(X[i : i + 1], level)
        assert torch.allclose(found.x0[i], single.x0[0])
        assert torch.allclose(found.noise[i], single.noise[0])


def test_draws_have_the_moments() -> None:
    """Each entry within five of its own standard errors; the draws of a seed are the same again."""
    drawn, n = PRIOR.draw(20000, seed=3), 20000
    c, away = PRIOR.covariance, PRIOR.draw(20000, seed=3) - PRIOR.mean
    variances = c.diagonal()
    assert bool((away.mean(0).abs() < 5 * (variances / n).sqrt()).all())
    assert bool(((away.T @ away / n - c).abs() < 5 * ((c.square() + variances[:, None] * variances) / n).sqrt()).all())
    assert torch.equal(drawn, PRIOR.draw(20000, seed=3))
    assert not torch.equal(drawn, PRIOR.draw(20000, seed=4))


def test_what_is_no_covariance_or_no_measurement_is_refused() -> None:
    negative, skew = torch.tensor([[[1, 0], [0, -1]], [[1, 0.5], [0, 1]]], dtype=torch.float64)
    for matrix in (negative, skew, torch.eye(2)):
        with pytest.raises(UsageError, match="a covariance is"):
            Gaussian(torch.zeros(2).double(), matrix)
    with pytest.raises(UsageError, match="depend on each other"):
        PRIOR.measured(OPERATOR[[0, 1, 0]], Y, 0.0)
    assert torch.isfinite(PRIOR.measured(OPERATOR[[0, 1, 0]], Y, 0.1).mean).all()
