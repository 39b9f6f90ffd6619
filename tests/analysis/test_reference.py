"""The reference problem's published numbers, to the digits printed, and the equivalences that hold on it."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import CLEAN, VP, Gaussian, Level, levels
from ldm_pipe.analysis import Affine, Problem, closeness, gaussian_w2, outcome, read_walk, reference_problem
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import Sampler

PATH = VP.linear()
PRIOR = Gaussian(reference_problem("pool2", 0.0).mean, reference_problem("pool2", 0.0).covariance)
problems = pytest.mark.parametrize("problem", [reference_problem("pool2", 0.1), reference_problem("mask4", 0.1)])


def grid(steps: int) -> list[Level]:
    """range(0, T, T // steps), from the last to the first, then clean."""
    return levels.leading(PATH, steps, offset=0)


def agrees(value: float, printed: str) -> bool:
    """Is this what the value reads when printed to as many decimals?"""
    return abs(value - float(printed)) <= 0.5 * 10.0 ** -len(printed.partition(".")[2]) * (1 + 1e-6)


def solved(problem: Problem) -> Gaussian:
    return Gaussian(problem.mean, problem.covariance).measured(problem.operator, problem.y, problem.deviation)


@pytest.mark.parametrize(
    ("operator", "deviation", "prior", "many", "few"),
    [
        ("pool2", 0.1, "3.19", ".0105/.000/.969", ".0713/.000/.794"),
        ("mask4", 0.1, "2.74", ".0109/.000/.987", ".0766/.000/.901"),
        ("pool2", 0.0, "3.44", ".0075/.000/.974", ".0549/.000/.816"),
        ("mask4", 0.0, "2.87", ".0080/.000/.989", ".0647/.000/.907"),
    ],
)
def test_exact_guidance_reproduces(operator: str, deviation: float, prior: str, many: str, few: str) -> None:
    """W2 to the exact posterior / relative error of the mean / ratio of the traces, in 1000 and 100 ancestral steps; the W2 of
    the prior itself."""
    exact = solved(reference_problem(operator, deviation))  # type: ignore[arg-type]
    right = exact.mean, exact.covariance
    assert agrees(gaussian_w2((PRIOR.mean, PRIOR.covariance), right), prior)
    for steps, printed in ((1000, many), (100, few)):
        found = closeness(outcome(exact, grid(steps), DDPM("small"), (8,)), right)
        assert all(agrees(value, text) for value, text in zip(found, printed.split("/"), strict=True)), found


@pytest.mark.parametrize(
    ("sampler", "steps", "printed"),
    [
        (DDPM("small"), 1000, ".0127"),
        (DDPM("large"), 1000, ".0043"),
        (DDIM(0.0), 10, ".472"),
        (DDIM(0.0), 50, ".103"),
        (DDIM(0.0), 1000, ".0057"),
        (DDIM(1.0), 50, ".197"),
    ],
)
def test_unconditional_samplers_reproduce(sampler: Sampler, steps: int, printed: str) -> None:
    found = outcome(PRIOR, grid(steps), sampler, (8,))
    assert agrees(gaussian_w2(found, (PRIOR.mean, PRIOR.covariance)), printed)


@pytest.mark.parametrize(
    ("start", "ancestral", "deterministic"),
    [(200, ".0114", ".588"), (400, ".0120", ".594"), (600, ".0126", ".259"), (800, ".0127", ".062")],
)
def test_noising_and_denoising_an_image_reproduces(start: int, ancestral: str, deterministic: str) -> None:
    """SDEdit of y from step t0: the ancestral walk draws from N(m + a J (y - m), C - a J C + s^2 J J'), the posterior's draw of
    a noised y; the deterministic walk is another map."""
    y = torch.arange(1, 9, dtype=torch.float64).sin()
    here = PATH.level(float(start - 1))  # the start-th of the steps, which count from 0
    gain, eye = PRIOR.gain(here), torch.eye(8, dtype=torch.float64)
    law = here.alpha * gain @ y, PRIOR.posterior(here) + here.sigma**2 * gain @ gain.T
    walk = [PATH.level(float(t)) for t in reversed(range(start))]
    noised = Affine(here.alpha * eye, 0 * y, here.sigma**2 * eye)
    for sampler, printed in ((DDPM("small"), ancestral), (DDIM(0.0), deterministic)):
        found = noised.then(read_walk(PRIOR, [*walk, CLEAN], sampler, (8,))).carry(y, 0 * eye)
        assert agrees(gaussian_w2(found, law), printed), gaussian_w2(found, law)


@problems
@pytest.mark.parametrize("steps", [20, 100])
def test_ddim_with_eta_1_is_ancestral(problem: Problem, steps: int) -> None:
    """And the restoration kernel without fresh noise is DDIM with eta 0; on the prior and on the posterior."""
    for denoise in (PRIOR, solved(problem)):
        for one, other in ((DDIM(1.0), DDPM("small")), (DDIM(0.0), Renoise(0.0))):
            a, b = (read_walk(denoise, grid(steps), sampler, (8,)) for sampler in (one, other))
            assert torch.allclose(a.matrix, b.matrix, rtol=0, atol=1e-10)
            assert torch.allclose(a.offset, b.offset, rtol=0, atol=1e-10)
            assert torch.allclose(a.covariance, b.covariance, rtol=0, atol=1e-10)


@problems
@pytest.mark.parametrize("time", [0.0, 300.0, 999.0])
def test_under_a_flat_prior_the_posterior_is_a_proximal_step(problem: Problem, time: float) -> None:
    """C = c I, c to infinity: the exact score of y becomes A' (d^2 I + (s/a)^2 A A')^-1 (y - A x / a) / a (DMPS with weight 1),
    and E[x0 | x, y] becomes argmin |y - A x0|^2 + rho |x0 - x / a|^2 with rho = (d a / s)^2 (DiffPIR's data step with lambda
    1). The gap falls as 1 / c."""
    level, d, a = PATH.level(time), problem.deviation, problem.operator
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scaled, rho = x / level.alpha, (d / level.ratio) ** 2
    inner = d * d * torch.eye(4) + level.ratio**2 * a @ a.T
    score = torch.linalg.solve(inner, (problem.y - scaled @ a.T).T).T @ a / level.alpha
    proximal = torch.linalg.solve(a.T @ a + rho * torch.eye(8), (problem.y @ a + rho * scaled).T).T
    gaps = []
    for c in (1e4, 1e5):
        flat = Gaussian(problem.mean, c * level.ratio**2 * torch.eye(8, dtype=torch.float64))
        posterior = flat.measured(a, problem.y, d)
        gaps.append(float((posterior.score(x, level) - flat.score(x, level) - score).abs().max() / score.abs().max()))
        gaps.append(float((posterior(x, level).x0 - proximal).abs().max() / proximal.abs().max()))
    assert max(gaps[:2]) < 1e-2
    assert gaps[2] == pytest.approx(gaps[0] / 10, rel=0.1)
    assert gaps[3] == pytest.approx(gaps[1] / 10, rel=0.1)
