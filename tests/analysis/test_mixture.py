"""The mixture against brute force: Bayes' rule integrated over a grid of x0, and autograd of torch's densities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ldm_pipe import CLEAN, Gaussian, Level, Mixture, UsageError

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.5, -1.0]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0], [0, 0.5]], [[0.2, -0.1], [-0.1, 0.2]]], dtype=torch.float64)
MIX = Mixture(WEIGHTS, MEANS, COVARIANCES)
CLASSES = torch.tensor([[0.9, 0.2, 0.0], [0.1, 0.8, 1.0]], dtype=torch.float64)  # p(class | component)
OPERATOR, Y = torch.tensor([[1.0, -0.5]], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
X = torch.randn(4, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
LEVELS = [Level(0.6, 0.8), Level(0.5, 0.5), Level(1.0, 3.0), Level(2.0, 0.4)]
SIDE = torch.linspace(-6, 6, 401, dtype=torch.float64)
GRID = torch.cartesian_prod(SIDE, SIDE)
levels = pytest.mark.parametrize("level", LEVELS)


def law(level: Level = CLEAN, weights: Tensor = WEIGHTS) -> MixtureSameFamily:
    """torch's own density of x at a level."""
    spread = level.alpha**2 * COVARIANCES + level.sigma**2 * torch.eye(2, dtype=torch.float64)
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(level.alpha * MEANS, spread))


def integrated(level: Level, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """E[x0 | x] and E[x0 x0' | x] of every row of X by Bayes' rule on the grid, under the prior's log density there."""
    x = X.reshape(4, 1, 2)
    posterior = (log_prior - (x - level.alpha * GRID).square().sum(2) / (2 * level.sigma**2)).softmax(1)
    return posterior @ GRID, torch.einsum("bn,nd,ne->bde", posterior, GRID, GRID)


@levels
def test_is_bayes_rule(level: Level) -> None:
    """The estimate, and the mean and the covariance of the whole posterior."""
    mean, square = integrated(level, law().log_prob(GRID))
    assert torch.allclose(MIX(X, level).x0.reshape(4, 2), mean, atol=1e-9)
    weights, means, covariances = MIX.posterior(X, level)
    whole = torch.einsum("bk,bkde->bde", weights, covariances + means[..., :, None] * means[..., None, :])
    assert torch.allclose((weights[..., None] * means).sum(1), mean, atol=1e-9)
    assert torch.allclose(whole, square, atol=1e-9)


@levels
def test_is_tweedies_formula(level: Level) -> None:
    """Noise, score and density with torch's; the covariance of the posterior is sigma^2 / alpha times the derivative of x0."""
    flat = X.reshape(4, 2).clone().requires_grad_()
    density = law(level).log_prob(flat)
    score = torch.autograd.grad(density.sum(), flat)[0]
    estimate = MIX(X, level)
    assert torch.allclose(estimate.noise.reshape(4, 2), -level.sigma * score, atol=1e-10)
    assert torch.allclose(level.mix(estimate.x0, estimate.noise), X, atol=1e-12)
    assert torch.allclose(MIX.score(X, level).reshape(4, 2), score, atol=1e-10)
    assert torch.allclose(MIX.log_density(X, level), density, atol=1e-10)
    assert torch.allclose(MIX.log_density(X), law().log_prob(X.reshape(4, 2)), atol=1e-10)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: MIX(x[None], level).x0[0]))(X.reshape(4, 2))
    weights, means, covariances = MIX.posterior(X, level)
    away = means - (weights[..., None] * means).sum(1, keepdim=True)
    total = torch.einsum("bk,bkde->bde", weights, covariances + away[..., :, None] * away[..., None, :])
    assert torch.allclose(total, level.sigma**2 / level.alpha * jacobian, atol=1e-10)


@levels
def test_a_class_is_bayes_rule(level: Level) -> None:
    """The conditional denoiser, the noisy classifier, and classifier guidance that joins them."""
    components = MultivariateNormal(MEANS, COVARIANCES).log_prob(GRID[:, None])
    x = X.clone().requires_grad_()
    log_classes = MIX.log_classes(x, level, CLASSES)
    assert torch.allclose(log_classes.exp().sum(1), torch.ones(4).double())
    for number, likelihood in enumerate(CLASSES):
        given = MIX.given(likelihood)
        mean, _ = integrated(level, (components + (WEIGHTS * likelihood).log()).logsumexp(1))
        assert torch.allclose(given(X, level).x0.reshape(4, 2), mean, atol=1e-9)
        share = (WEIGHTS * likelihood).sum()
        bayes = law(level, given.weights).log_prob(X.reshape(4, 2)) + share.log() - law(level).log_prob(X.reshape(4, 2))
        assert torch.allclose(log_classes[:, number], bayes, atol=1e-10)
        gradient = torch.autograd.grad(log_classes[:, number].sum(), x, retain_graph=True)[0]
        assert torch.allclose(given.score(X, level) - MIX.score(X, level), gradient, atol=1e-10)
        guided = MIX(X, level).x0 + level.sigma**2 / level.alpha * gradient
        assert torch.allclose(given(X, level).x0, guided, atol=1e-10)


@levels
@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_a_measurement_is_bayes_rule(level: Level, deviation: float) -> None:
    """The conditional denoiser by integration; and, by autograd of log p(y | x), exact guidance."""
    measured = MIX.measured(OPERATOR, Y, deviation)
    log_prior = law().log_prob(GRID) - (GRID @ OPERATOR[0] - Y).square() / (2 * deviation**2)
    assert torch.allclose(measured(X, level).x0.reshape(4, 2), integrated(level, log_prior)[0], atol=1e-9)
    x = X.clone().requires_grad_()
    weights, means, covariances = MIX.posterior(x, level)
    spread = (OPERATOR @ covariances @ OPERATOR.T)[..., 0, 0] + deviation**2
    surprise = Y - means @ OPERATOR[0]
    log_y = (weights.log() - 0.5 * (surprise.square() / spread + spread.log())).logsumexp(1)
    gradient = torch.autograd.grad(log_y.sum(), x)[0]
    assert torch.allclose(measured.score(X, level) - MIX.score(X, level), gradient, atol=1e-10)
    assert torch.allclose(measured(X, level).x0, MIX(X, level).x0 + level.sigma**2 / level.alpha * gradient, atol=1e-10)


def test_a_measurement_without_noise_is_met() -> None:
    exact, near = MIX.measured(OPERATOR, Y, 0.0), MIX.measured(OPERATOR, Y, 1e-5)
    for level in (Level(0.0, 1.0), *LEVELS):
        assert torch.allclose(exact(X, level).x0.reshape(4, 2) @ OPERATOR[0], Y.expand(4), atol=1e-10)
        assert torch.allclose(exact(X, level).x0, near(X, level).x0, atol=1e-7)
    assert torch.allclose(exact.draw(50) @ OPERATOR[0], Y.expand(50), atol=1e-7)


def test_both_ends() -> None:
    """Also where a covariance is singular: there the estimates are finite, and what needs a density refuses."""
    flat = Mixture.isotropic(WEIGHTS, MEANS, 0.0)
    for mixture in (MIX, flat):
        pure, clean = mixture(X, Level(0.0, 2.0)), mixture(X, Level(2.0, 0.0))
        assert torch.allclose(pure.x0.reshape(4, 2), (WEIGHTS @ MEANS).expand(4, 2))
        assert torch.allclose(pure.noise, X / 2)
        assert torch.allclose(clean.x0, X / 2)
        assert torch.equal(clean.noise, torch.zeros_like(X))
    assert torch.allclose(MIX.responsibilities(X, Level(0.0, 1.0)), WEIGHTS.expand(4, 3))
    assert float(MIX.posterior(X, Level(1.0, 0.0)).covariances.abs().max()) == 0
    for refused in (flat.posterior, flat.responsibilities, flat.log_density, flat.score):
        with pytest.raises(UsageError, match="no density"):
            refused(X, CLEAN)


def test_far_from_every_component_it_is_still_a_number() -> None:
    """All the densities underflow there; their ratio does not: the component that reaches farthest takes it all."""
    x, level = torch.tensor([[-3000.0, 0.0]], dtype=torch.float64), Level(0.99, 0.1)
    assert torch.allclose(MIX(x, level).x0, Gaussian(MEANS[0], COVARIANCES[0])(x, level).x0)


@levels
def test_components_alone_and_alike(level: Level) -> None:
    """One component is the Gaussian, twice the same is too, and one without weight does not count."""
    one = Gaussian(MEANS[0], COVARIANCES[0])
    twice = Mixture(WEIGHTS, MEANS[[0, 0, 0]], COVARIANCES[[0, 0, 0]])
    alone = Mixture(torch.tensor([1.0, 0.0, 0.0]).double(), MEANS, COVARIANCES)
    for mixture in (twice, alone):
        assert torch.allclose(mixture(X, level).x0, one(X, level).x0, atol=1e-12)
        assert torch.allclose(mixture(X, level).noise, one(X, level).noise, atol=1e-12)


def test_isotropic_components_have_the_known_variances() -> None:
    """Var(x0 | x, k) = d^2 sigma^2 / (alpha^2 d^2 + sigma^2)."""
    d, level = 0.3, LEVELS[0]
    variance = d * d * level.sigma**2 / (level.alpha**2 * d * d + level.sigma**2)
    found = Mixture.isotropic(WEIGHTS, MEANS, d).posterior(X, level).covariances
    assert torch.allclose(found, variance * torch.eye(2, dtype=torch.float64).expand(1, 3, 2, 2), atol=1e-12)


def test_a_level_may_be_one_of_every_row() -> None:
    own = [*LEVELS[:2], Level(0.0, 1.0), Level(2.0, 0.0)]
    column = Level(*(torch.tensor(side, dtype=torch.float64).reshape(4, 1, 1, 1) for side in zip(*own, strict=True)))
    found, shares = MIX(X, column), MIX.posterior(X, column)
    for i, level in enumerate(own):
        single = MIX(X[i : i + 1], level)
        assert torch.allclose(found.x0[i], single.x0[0])
        assert torch.allclose(found.noise[i], single.noise[0])
        for all_rows, one in zip(shares, MIX.posterior(X[i : i + 1], level), strict=True):
            assert torch.allclose(all_rows[i], one[0])


def test_moments_and_draws() -> None:
    """The moments by integration; the draws within five standard errors of them, and of the weights."""
    density = law().log_prob(GRID).softmax(0)
    mean, covariance = MIX.moments()
    assert torch.allclose(mean, density @ GRID, atol=1e-9)
    assert torch.allclose(covariance, torch.einsum("n,nd,ne->de", density, GRID - mean, GRID - mean), atol=1e-9)
    n, drawn = 20000, MIX.draw(20000, seed=2)
    assert bool(((drawn.mean(0) - mean).abs() < 5 * (covariance.diagonal() / n).sqrt()).all())
    shares = MIX.responsibilities(drawn)
    assert bool(((shares.mean(0) - WEIGHTS).abs() < 5 * (shares.var(0) / n).sqrt()).all())
    assert torch.equal(drawn, MIX.draw(20000, seed=2))


def test_what_is_no_mixture_is_refused() -> None:
    for weights in ([0.5, 0.6, 0.2], [1.5, -0.5, 0.0]):
        with pytest.raises(UsageError, match="sum to 1"):
            Mixture(torch.tensor(weights).double(), MEANS, COVARIANCES)
    with pytest.raises(UsageError, match="a covariance is"):
        Mixture(WEIGHTS, MEANS, -COVARIANCES)
    with pytest.raises(UsageError, match="impossible"):
        Mixture(torch.tensor([1.0, 0.0, 0.0]).double(), MEANS, COVARIANCES).given(torch.tensor([0.0, 1.0, 1.0]).double())
    with pytest.raises(UsageError, match="depend on each other"):
        MIX.measured(OPERATOR[[0, 0]], Y.repeat(2), 0.0)
