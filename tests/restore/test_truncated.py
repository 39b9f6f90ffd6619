"""Truncated starts: the law of what they make, and how they forget their estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm_pipe import CLEAN, VP, Level, Noise, levels
from ldm_pipe.analysis import gaussian_w2, outcome, read_walk
from ldm_pipe.restore.ilvr import ILVR
from ldm_pipe.restore.truncated import CCDF, Truncated
from ldm_pipe.samplers.ddpm import DDPM

SHAPE = (2, 2, 2)


def walk(start: int) -> list[Level]:
    """From the start-th of 1000 steps, counted from 0, one by one."""
    return [*(VP.linear().level(float(t)) for t in reversed(range(start))), CLEAN]


@pytest.mark.parametrize(("start", "printed"), [(200, ".0114"), (400, ".0120")])
def test_the_law_of_what_is_made(reference: Any, start: int, printed: str) -> None:
    """Of SDEdit from y: the posterior given a noised y, N(m + a J (y - m), C - a J C + s^2 J J')."""
    problem = reference("pool2", 0.0)
    y, prior, here = torch.arange(1, 9).double().sin(), problem.prior, walk(start)[0]
    found = outcome(prior, walk(start), Truncated(problem.measurement, DDPM(), y.reshape(1, *SHAPE)), SHAPE)
    gain = prior.gain(here)
    law = here.alpha * gain @ y, prior.posterior(here) + here.sigma**2 * gain @ gain.T
    assert abs(gaussian_w2(found, law) - float(printed)) < 0.55e-4


@pytest.mark.parametrize(("start", "printed"), [(100, 0.982), (200, 0.923), (400, 0.601)])
def test_how_much_of_the_estimate_is_left(reference: Any, start: int, printed: float) -> None:
    """Two chains with one noise: the difference of their ends is alpha times the product of the steps on that of their
    estimates; its norm."""
    prior = reference("pool2", 0.0).prior
    matrix = read_walk(prior, walk(start), DDPM(), SHAPE).matrix
    assert abs(float(walk(start)[0].alpha * torch.linalg.matrix_norm(matrix, 2)) - printed) < 0.55e-3


def test_the_start_is_the_pseudo_inverse_or_the_estimate(reference: Any, noise: Noise) -> None:
    m, level, z = reference("mask4", 0.0).measurement, Level(0.6, 0.8), noise.start()
    given = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    assert torch.allclose(Truncated(m, DDPM()).start(z, level), 0.6 * m.operator.pinv(m.y) + 0.8 * z)
    assert torch.allclose(Truncated(m, DDPM(), given).start(z, level), 0.6 * given + 0.8 * z)
    noisy = reference("pool2", 0.5).measurement  # with noise in the data, as well as its deviation allows: a ridge
    a = noisy.operator.matrix
    ridge = torch.linalg.solve(a.T @ a + 0.25 * torch.eye(8, dtype=torch.float64), a.T @ noisy.y[0]).reshape(1, *SHAPE)
    assert torch.allclose(Truncated(noisy, DDPM()).start(z, level), 0.6 * ridge + 0.8 * z)


def test_a_data_step_after_each_step(reference: Any) -> None:
    """CCDF: with the data put in on the way the end fits them, and the mean is nearer to the posterior's than without."""
    problem = reference("mask4", 0.0)
    tail = levels.tail(levels.leading(VP.linear(), 100, offset=0), 0.3)
    bare = Truncated(problem.measurement, DDPM())
    merged = CCDF(problem.measurement, DDPM())
    ends = [problem.judge(problem.prior, sampler, tail) for sampler in (bare, merged)]
    assert ends[1].mean_error < ends[0].mean_error
    mean = outcome(problem.prior, tail, merged, SHAPE)[0].reshape(1, *SHAPE)
    assert float(problem.measurement.misfit(mean).abs().max()) < 1e-12
    same = Truncated(problem.measurement, ILVR(problem.measurement, DDPM()))
    for a, b in zip(outcome(problem.prior, tail, merged, SHAPE), outcome(problem.prior, tail, same, SHAPE), strict=True):
        assert torch.equal(a, b)


def test_ccdf_without_data_is_sdedit_and_difface_of_the_picture_too(reference: Any, noise: Noise) -> None:
    """B = I is a mask that knows nothing; DifFace's estimate, where it is the picture itself, is SDEdit under its kernel."""
    from ldm_pipe import sample
    from ldm_pipe.restore.mask import Mask
    from ldm_pipe.restore.operator import Measurement
    from ldm_pipe.samplers.ddim import DDIM

    prior, given = reference("pool2", 0.0).prior, torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    nothing = Measurement(Mask(torch.zeros(1)), torch.zeros(1, *SHAPE))
    for method, inner in ((CCDF, DDPM()), (Truncated, DDIM(0.5))):
        sampler = method(nothing, inner, given, 0.4)
        tail = sampler.walk(levels.leading(VP.linear(), 50))
        assert tail == levels.tail(levels.leading(VP.linear(), 50), 0.4)
        one = sample(prior, sampler.start(noise.start(), tail[0]), tail, sampler, noise)
        assert torch.equal(one, sample(prior, tail[0].mix(given, noise.start()), tail, inner, noise))


def test_two_walks_of_ccdf_come_nearer_than_two_of_sdedit(reference: Any) -> None:
    """The data step is not expansive: the map of the whole walk shrinks."""
    problem, tail = reference("mask4", 0.0), walk(200)
    norms = [
        float(torch.linalg.matrix_norm(read_walk(problem.prior, tail, method(problem.measurement, DDPM()), SHAPE).matrix, 2))
        for method in (CCDF, Truncated)
    ]
    assert norms[0] < 0.9 * norms[1]
