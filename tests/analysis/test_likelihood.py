"""The log-likelihood by the ODE is the closed form's, on Gaussians and mixtures, with exact and with estimated divergence."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import VP, Gaussian, Level, Mixture, UsageError
from ldm_pipe.analysis import log_likelihood

INDEX = torch.arange(6, dtype=torch.float64)
PRIOR = Gaussian(INDEX.sin(), 0.9 ** (INDEX[:, None] - INDEX).abs())
NOISE = Level(0.0, 1.0)


@pytest.mark.parametrize("low", [Level(0.98, 0.02), Level(2.0, 0.5), VP.linear().level(100)])
def test_it_is_the_gaussians_density(low: Level) -> None:
    x = low.alpha * PRIOR.draw(5).reshape(5, 1, 2, 3) + 0.1
    got = log_likelihood(PRIOR, x, low, NOISE, 1e-8)
    assert got.tolist() == pytest.approx(PRIOR.log_density(x, low).tolist(), abs=1e-4)


def test_down_to_clean_and_for_one_image_alone() -> None:
    x = PRIOR.draw(3)
    whole = log_likelihood(PRIOR, x, Level(1.0, 0.0), NOISE, 1e-8)
    assert whole.tolist() == pytest.approx(PRIOR.log_density(x).tolist(), abs=1e-4)
    assert float(log_likelihood(PRIOR, x[1:2], Level(1.0, 0.0), NOISE, 1e-8)[0]) == pytest.approx(float(whole[1]), abs=1e-4)


def test_it_is_a_mixtures_density() -> None:
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    spread = torch.stack([0.1 * torch.eye(2), 0.3 * torch.eye(2)]).double()
    mixture = Mixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, spread)
    low, x = Level(0.99, 0.05), mixture.draw(6)
    got = log_likelihood(mixture, x, low, NOISE, 1e-7)
    assert got.tolist() == pytest.approx(mixture.log_density(x, low).tolist(), abs=1e-3)


def test_a_path_that_ends_before_pure_noise_takes_the_normal_prior() -> None:
    """Off by what the end of the path still holds of the data: exact where the data have unit variance and mean 0."""
    plain = Gaussian(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    x, low = PRIOR.draw(3), VP.linear().level(0)
    for high in (VP.linear().level(999), VP.linear().level(300), Level(1.0, 20.0)):
        got = log_likelihood(plain, x, low, high, 1e-8)
        assert got.tolist() == pytest.approx(plain.log_density(x, low).tolist(), abs=1e-5)


def test_hutchinsons_estimate_is_unbiased_and_repeatable() -> None:
    x, low = PRIOR.draw(2), Level(0.95, 0.05)
    exact = log_likelihood(PRIOR, x, low, NOISE)
    one, again, other = (log_likelihood(PRIOR, x, low, NOISE, probes=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    many = log_likelihood(PRIOR, x, low, NOISE, 1e-3, probes=600)
    assert float((many - exact).abs().max()) < 0.5 < float((one - exact).abs().max() + (other - exact).abs().max())


def test_signs_alone_are_exact_for_a_diagonal_divergence() -> None:
    """e' J e is the trace for every e where J is diagonal."""
    plain = Gaussian(torch.zeros(4, dtype=torch.float64), torch.diag(torch.tensor([1.0, 2.0, 0.5, 0.1])).double())
    x = plain.draw(3)
    got = log_likelihood(plain, x, Level(0.9, 0.1), NOISE, 1e-8, probes=1)
    assert got.tolist() == pytest.approx(plain.log_density(x, Level(0.9, 0.1)).tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "probes"), [(NOISE, NOISE, None), (Level(0.5, 0.5), Level(0.9, 0.1), None), (Level(0.9, 0.1), NOISE, 0)]
)
def test_what_cannot_be_is_refused(low: Level, high: Level, probes: int | None) -> None:
    with pytest.raises(UsageError, match="log_likelihood needs low below high"):
        log_likelihood(PRIOR, PRIOR.draw(1), low, high, probes=probes)
