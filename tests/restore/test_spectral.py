"""DDNM, DDNM+ and DDRM direction by direction: what they promise about data and variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Level, Noise, levels, sample, trajectory
from ldm_pipe.model import Estimate
from ldm_pipe.path import VP
from ldm_pipe.restore.ddnm import DDNM
from ldm_pipe.restore.ddnm_plus import DDNMPlus, DDNMScaled
from ldm_pipe.restore.ddrm import DDRM
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.matrix import Matrix
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.samplers.renoise import Renoise

SHAPE = (2, 2, 2)
Draw = Callable[..., Tensor]


@pytest.fixture
def uneven(draw: Draw) -> Matrix:
    """Singular values from 2 to .1 in turned axes, and three directions that are not seen."""
    basis = torch.linalg.qr(draw(8, 8))[0]
    return Matrix(torch.diag(torch.tensor([2, 1, 0.5, 0.2, 0.1]).double()) @ basis[:5], SHAPE)


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
def test_ddnm_fits_the_data_at_every_level(reference: Any, grid: Any, noise: Noise, operator: str) -> None:
    problem = reference(operator, 0.0)
    m, guided = problem.measurement, DDNM(problem.measurement)(problem.prior)
    for done in trajectory(guided, noise.start(), grid(20), Renoise(0.85), noise):
        assert float(m.misfit(done.estimate.x0).abs().max()) < 1e-12
    assert float(m.misfit(done.x).abs().max()) < 1e-12


def test_ddnm_keeps_the_noise_of_the_network(reference: Any, noise: Noise) -> None:
    problem, level, x = reference("pool2", 0.0), Level(0.6, 0.8), noise.start()
    guided, plain = DDNM(problem.measurement)(problem.prior)(x, level), problem.prior(x, level)
    assert torch.equal(guided.noise, plain.noise)
    assert float((guided.x0 - plain.x0).abs().max()) > 0.1


def test_where_everything_is_known_ddnm_returns_it(reference: Any, grid: Any, noise: Noise, draw: Draw) -> None:
    y = draw(1, *SHAPE)
    guided = DDNM(Measurement(Mask(torch.ones(1)), y))(reference("pool2", 0.0).prior)
    assert torch.equal(sample(guided, noise.start(), grid(10), Renoise(), noise), y.expand(3, *SHAPE))


@pytest.mark.parametrize("method", [DDRM, DDNMPlus, lambda m, eta: DDRM(m, eta, 0.7)], ids=["ddrm", "ddnm+", "ddrm .7"])
@pytest.mark.parametrize("eta", [0.85, 0.3, 1.0])
@pytest.mark.parametrize("there", [Level(0.5, 0.9), Level(0.9, 0.3), Level(0.99, 0.02)])
def test_the_right_x0_gives_the_right_variance(uneven: Matrix, method: Any, eta: float, there: Level) -> None:
    """With the truth as x0, the network's noise, the data's noise and the fresh noise are together sigma_s^2 on every axis.

    The three noises are fed as unit vectors: 8 rows of eps, 5 of the data's, 8 of the fresh ones.
    """
    zeros = torch.zeros(21, 8, dtype=torch.float64)
    eps, fresh, data = zeros.clone(), zeros.clone(), torch.zeros(21, 5, dtype=torch.float64)
    eps[:8], data[8:13], fresh[13:] = torch.eye(8), torch.eye(5), torch.eye(8)
    truth = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, *SHAPE)
    measurement = Measurement(uneven, uneven(truth) + 0.1 * data, 0.1)
    sampler = method(measurement, eta)
    step = sampler.step(
        lambda x, level: Estimate(truth.expand_as(x), eps.reshape(x.shape)), zeros.reshape(-1, *SHAPE), Level(0.3, 1.0),
        there, None, lambda tag="step": fresh.reshape(-1, *SHAPE),
    )  # fmt: skip
    columns = (step.x - there.alpha * truth).flatten(1)
    assert torch.allclose(columns.T @ columns, there.sigma**2 * torch.eye(8, dtype=torch.float64), atol=1e-12)
    unseen = columns[:8] @ torch.linalg.svd(uneven.matrix)[2][5:].T
    assert (float(unseen.abs().max()) < 1e-12) == (eta == 1)  # the share of eps where nothing is seen


def test_ddrm_starts_from_the_data(uneven: Matrix, draw: Draw) -> None:
    """Mean and covariance by unit vectors: the data where they are better than the level, nothing elsewhere."""
    eye = torch.cat([torch.zeros(1, 8), torch.eye(8)]).double().reshape(-1, *SHAPE)
    y = draw(1, 5)
    for level in (Level(0.2, 0.95), Level(0.8, 0.3), Level(0.0, 1.0)):
        rows = DDRM(Measurement(uneven, y, 0.1)).start(eye, level).flatten(1)
        turned = (rows[1:] - rows[0]) @ torch.linalg.svd(uneven.matrix)[2].T
        theta = level.alpha * 0.1 / torch.tensor([2, 1, 0.5, 0.2, 0.1]).double()
        seen = theta < level.sigma
        spread = torch.cat([torch.where(seen, level.sigma**2 - theta**2, level.sigma**2), level.sigma**2 * torch.ones(3)])
        assert torch.allclose((turned.T @ turned), torch.diag(spread), atol=1e-12)
        expected = torch.where(seen, level.alpha * y[0], 0.0)
        assert torch.allclose(uneven.matrix @ rows[0], expected, atol=1e-12)


def test_small_noise_in_the_data_is_not_none(reference: Any, grid: Any) -> None:
    """DDNM+ draws fresh noise where the data are known, DDNM keeps the network's: two limits, both stated."""
    from ldm_pipe.analysis import outcome

    problem, tiny = reference("mask4", 0.0), reference("mask4", 1e-7)
    plus = outcome(problem.prior, grid(40), DDNMPlus(tiny.measurement), SHAPE)
    zero = outcome(problem.prior, grid(40), DDNMPlus(problem.measurement), SHAPE)
    ddnm = outcome(DDNM(problem.measurement)(problem.prior), grid(40), Renoise(0.85), SHAPE)
    assert float((plus[0] - zero[0]).abs().max()) < 1e-2 < float((zero[0] - ddnm[0]).abs().max())


def test_real_operators_end_near_the_data() -> None:
    """Every method by singular values on an image and each linear operator of the command line: a run that hangs together."""
    from ldm_pipe import Gaussian
    from ldm_pipe.restore.text import parse

    noise = Noise((1,), (3, 8, 8), dtype=torch.float64)
    prior = Gaussian.isotropic(torch.zeros(3, 8, 8), 0.5)
    for text in ("pool(2)", "bicubic(2)", "blur(gaussian, 1)", "blur_zero(gaussian, 1)", "mask(box)", "grey", "cs(4)"):
        known: Any = parse(text)
        m = Measurement(known, known(0.5 * noise.at(9)("truth")), 0.0)
        walk = levels.leading(VP.linear(), 20)
        ends = [sample(prior, s.start(noise.start(), walk[0]), walk, s, noise) for s in (DDRM(m), DDNMPlus(m))]
        ends.append(sample(DDNM(m)(prior), noise.start(), walk, Renoise(), noise))
        assert [float(m.misfit(e).norm() / m.y.norm()) < w for e, w in zip(ends, (0.05, 1e-9, 1e-9), strict=True)] == [True] * 3


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
@pytest.mark.parametrize("deviation", [0.0, 0.1, 0.6, 3.0])
def test_the_scalar_form_in_dense_matrices(reference: Any, noise: Noise, operator: str, deviation: float) -> None:
    """x_s = c x0' + c_t x + sqrt(v - (c l d)^2) z, x0' = x0 - l A+ (A x0 - y), l = min(1, sqrt(v) / (c d)); on the circle
    c = sqrt(abar_s) b / (1 - abar_t), c_t = sqrt(r) (1 - abar_s) / (1 - abar_t), v = b (1 - abar_s) / (1 - abar_t)."""
    problem, x, here, there = reference(operator, deviation), noise.start(), Level(0.6, 0.8), Level(0.8, 0.6)
    a, y = problem.measurement.operator.matrix, problem.measurement.y
    r = 0.36 / 0.64
    b = 1 - r
    c, ct, v = 0.8 * b / 0.64, r**0.5 * 0.36 / 0.64, b * 0.36 / 0.64
    gain = 1.0 if deviation == 0 else min(1.0, v**0.5 / (c * deviation))
    assert (gain < 1) == (deviation > 1)
    x0 = problem.prior(x, here).x0.flatten(1)
    fit = x0 - gain * (x0 @ a.T - y) @ torch.linalg.pinv(a).T
    fresh = noise.at(2)("step").flatten(1)
    right = c * fit + ct * x.flatten(1) + max(v - (c * gain * deviation) ** 2, 0.0) ** 0.5 * fresh
    found = DDNMScaled(problem.measurement).step(problem.prior, x, here, there, None, noise.at(2)).x
    assert torch.allclose(found.flatten(1), right, atol=1e-12)


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
def test_the_scalar_form_without_noise_is_ancestral_sampling_of_the_projected_x0(
    reference: Any, grid: Any, noise: Noise, operator: str
) -> None:
    """DDNM's own algorithm 1: the noise follows from the new x0 there, as it does in the ancestral kernel."""
    from ldm_pipe.restore.diffpir import DiffPIR
    from ldm_pipe.samplers.ddpm import DDPM

    problem = reference(operator, 0.0)
    one = sample(problem.prior, noise.start(), grid(20), DDNMScaled(problem.measurement), noise)
    other = sample(DiffPIR(problem.measurement, least=0.0)(problem.prior), noise.start(), grid(20), DDPM(), noise)
    assert torch.allclose(one, other, atol=1e-11)
    assert float(problem.measurement.misfit(one).abs().max()) < 1e-12
