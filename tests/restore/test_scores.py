"""DPS and DMPS: the gradients are the right ones, and land where the papers put them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Level, Noise, sample
from ldm_pipe.restore.clip import Clip
from ldm_pipe.restore.dmps import DMPS
from ldm_pipe.restore.dps import DPS, DPSScore
from ldm_pipe.restore.function import Function
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.heun import Heun

SHAPE = (2, 2, 2)
Draw = Callable[..., Tensor]
HERE, THERE = Level(0.6, 0.8), Level(0.8, 0.6)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_dps_takes_the_gradient_of_the_norm(reference: Any, noise: Noise, draw: Draw, scale: float) -> None:
    """By finite differences of |y - A x0(x)|, of a non-linear A, one image at a time."""
    prior, x = reference("pool2", 0.1).prior, noise.start()
    m = Measurement(Function(lambda z: z.flatten(1)[:, :5] ** 3 + z.flatten(1)[:, 3:]), draw(1, 5))
    moved = DPS(m, DDPM(), scale).step(prior, x, HERE, THERE, None, noise.at(2)).x
    plain = DDPM().step(prior, x, HERE, THERE, None, noise.at(2)).x
    h, units = 1e-5, torch.eye(8, dtype=torch.float64).reshape(8, *SHAPE)

    def norms(z: Tensor) -> Tensor:
        return (m.y - m.operator(prior(z, HERE).x0)).square().sum(1).sqrt()

    for k in range(3):
        slope = (norms(x[k] + h * units) - norms(x[k] - h * units)) / (2 * h)
        assert torch.allclose(moved[k].flatten() - plain[k].flatten(), -scale * slope, atol=1e-8)


def test_the_squared_form_on_a_gaussian(reference: Any, noise: Noise) -> None:
    """The gradient of |r|^2 is -2 J' A' r; it enters as b / (2 deviation^2 sqrt r) of it after an ancestral step."""
    problem, x = reference("pool2", 0.1), noise.start()
    prior, m = problem.prior, problem.measurement
    there = Level(0.8, 0.6)
    found = DDPM().step(DPSScore(m)(prior), x, HERE, there, None, noise.at(2)).x
    plain = DDPM().step(prior, x, HERE, there, None, noise.at(2)).x
    misfit = m.misfit(prior(x, HERE).x0)
    gradient = -2 * misfit @ m.operator.matrix @ prior.gain(HERE)
    r = (0.6 / 0.8) ** 2
    assert torch.allclose((found - plain).flatten(1), -(1 - r) / (2 * 0.1**2 * r**0.5) * gradient, atol=1e-10)


def test_a_sampler_that_asks_twice_is_answered_twice(reference: Any, noise: Noise, grid: Any) -> None:
    """Only the very x of the gradient is known already: Heun under a vanishing gradient is Heun."""
    problem = reference("pool2", 0.1)
    ends = [sample(problem.prior, noise.start(), grid(8), s, noise) for s in (DPS(problem.measurement, Heun(), 1e-30), Heun())]
    assert torch.equal(*ends)


def test_dps_walks_through_a_clamp(noise: Noise, reference: Any) -> None:
    """Where nothing moves the data the gradient is 0, and the step is the sampler's."""
    prior, x = reference("pool2", 0.1).prior, noise.start()
    m = Measurement(Clip(1e6), 1 - 2 * torch.zeros(1, *SHAPE))
    moved = DPS(m, DDPM()).step(prior, x, HERE, THERE, None, noise.at(2)).x
    assert torch.equal(moved, DDPM().step(prior, x, HERE, THERE, None, noise.at(2)).x)


@pytest.mark.parametrize("weight", [1.0, 1.75])
@pytest.mark.parametrize("operator", ["pool2", "mask4"])
def test_dmps_in_dense_matrices(reference: Any, noise: Noise, operator: str, weight: float) -> None:
    """x_s = ancestral + weight (b / sqrt r) g with g = A' (d^2 + s^2 A A')^-1 (y - A x / a) / a, s = sigma / a, at x_t."""
    problem, x = reference(operator, 0.1), noise.start()
    a, m = problem.measurement.operator.matrix, problem.measurement
    found = DDPM().step(DMPS(m, weight)(problem.prior), x, HERE, THERE, None, noise.at(2)).x
    plain = DDPM().step(problem.prior, x, HERE, THERE, None, noise.at(2)).x
    inner = 0.1**2 * torch.eye(4) + (0.8 / 0.6) ** 2 * a @ a.T
    g = torch.linalg.solve(inner, (m.y - x.flatten(1) @ a.T / 0.6).T).T @ a / 0.6
    r = (0.6 / 0.8) ** 2
    assert torch.allclose((found - plain).flatten(1), weight * (1 - r) / r**0.5 * g, atol=1e-12)


def test_dps_for_poisson_noise_divides_by_the_brightness(reference: Any, noise: Noise) -> None:
    """By the mean of 1 / |y|, one picture at a time, and by no less than .05."""
    prior, x = reference("pool2", 0.1).prior, noise.start()
    y = torch.tensor([[0.5, -0.25, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    m = Measurement(reference("pool2", 0.1).measurement.operator, y)
    plain, moved, divided = (
        s.step(prior, x, HERE, THERE, None, noise.at(2)).x for s in (DDPM(), DPS(m, DDPM()), DPS(m, DDPM(), poisson=True))
    )
    share = torch.tensor([(2 + 4 + 1 + 20) / 4, 1.0, 10.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    assert torch.allclose(divided - plain, share * (moved - plain), atol=1e-12)


@pytest.mark.parametrize("operator", ["pool2", "mask4"])
def test_adir_in_dense_matrices(reference: Any, noise: Noise, operator: str) -> None:
    """m + s v 2 A' (y_t - A m), y_t at the level left; and s = 0 is ancestral sampling."""
    from ldm_pipe.restore.adir import ADIR

    problem, x = reference(operator, 0.1), noise.start()
    a, estimate = problem.measurement.operator.matrix, problem.prior(x, HERE)
    plain = DDPM().step(problem.prior, x, HERE, THERE, None, lambda tag="step": 0 * x).x.flatten(1)
    v = (1 - 0.36 / 0.64) * 0.36 / 0.64
    y_t = 0.6 * problem.measurement.y + 0.8 * estimate.noise.flatten(1) @ a.T
    right = plain + 3.0 * v * 2 * (y_t - plain @ a.T) @ a + v**0.5 * noise.at(2)("step").flatten(1)
    found = ADIR(problem.measurement, 3.0).step(problem.prior, x, HERE, THERE, None, noise.at(2)).x.flatten(1)
    assert torch.allclose(found, right, atol=1e-12)
    none = ADIR(problem.measurement, 0.0).step(problem.prior, x, HERE, THERE, None, noise.at(2)).x
    assert torch.allclose(none, DDPM().step(problem.prior, x, HERE, THERE, None, noise.at(2)).x, atol=1e-14)
