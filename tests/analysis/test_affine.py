"""Affine propagation against recursions written in numpy, against the walk itself, and on walks that are not affine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_pipe import CLEAN, PREDICTIONS, VP, Cond, Estimate, Gaussian, Level, Mixture, Model, UsageError, levels, sample
from ldm_pipe.analysis import Affine, ExactNetwork, outcome, read_walk, reference_problem
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import NoNoise, StepNoise
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.heun import Heun
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import Sampler, Step

SPAN = torch.arange(8, dtype=torch.float64)
PRIOR = Gaussian(torch.sin(SPAN), 0.9 ** (SPAN[:, None] - SPAN).abs())
SHAPE = (2, 2, 2)


def close(a: Affine, b: Affine, within: float = 1e-10) -> None:
    for ours, theirs in zip((a.matrix, a.offset, a.covariance), (b.matrix, b.offset, b.covariance), strict=True):
        assert float((ours - theirs).abs().max()) < within


@dataclass(frozen=True)
class Remembering(Sampler):
    """A linear sampler with memory, two draws a step, one of which is remembered, and travel."""

    travels: ClassVar[bool] = True

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        estimate = denoise(x, here)
        pull = estimate.x0 + (0.0 if memory is None else memory)
        return Step(0.6 * x + 0.3 * pull + 0.2 * noise("a") + 0.1 * noise("b"), estimate, 0.5 * pull + 0.4 * noise("b"))


@dataclass(frozen=True)
class Wayward(Sampler):
    """What is not affine, by name."""

    way: str

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        estimate = denoise(x, here)
        if self.way == "clips":
            return Step(estimate.x0.clamp(-1, 1), estimate)
        if self.way == "couples the batch":
            return Step(x / x.norm(), estimate)
        if self.way.startswith("draws"):
            large = float(x.abs().max()) > 2
            return Step(x + noise("step") if large == (self.way == "draws if large") else x, estimate)
        return Step(x * noise("step"), estimate)


@pytest.mark.parametrize("walk", [[0.9, 0.7, 0.5, 0.3, 0.1], [0.9, 0.5, 0.7, 0.6, 0.2]], ids=["falling", "travelling"])
def test_a_sampler_with_memory_by_its_state_space(walk: list[float]) -> None:
    """The recursion of (x, memory) jointly, whose memory is forgotten where the levels rise."""
    path = [Level(1 - u, u) for u in walk]
    eye, zero = np.eye(8), np.zeros((8, 8))
    mean, covariance = np.ones(16), np.block([[2 * eye, zero], [zero, zero]])
    mean[8:] = 0
    for here, there in pairwise(path):
        j = PRIOR.gain(here).numpy()
        still = (PRIOR.mean.numpy() - here.alpha * j @ PRIOR.mean.numpy()) * 1.0
        keep = 0 if there.u > here.u else 1
        if not keep:
            mean[8:], covariance[8:], covariance[:, 8:] = 0, 0, 0
        f = np.block([[0.6 * eye + 0.3 * j, 0.3 * eye], [0.5 * j, 0.5 * eye]])
        g = np.block([[0.2 * eye, 0.1 * eye], [zero, 0.4 * eye]])
        mean = f @ mean + np.concatenate([0.3 * still, 0.5 * still])
        covariance = f @ covariance @ f.T + g @ g.T
    found = read_walk(PRIOR, path, Remembering(), SHAPE).carry(torch.ones(8).double(), 2 * torch.eye(8).double())
    assert np.abs(found[0].numpy() - mean[:8]).max() < 1e-12
    assert np.abs(found[1].numpy() - covariance[:8, :8]).max() < 1e-12


@pytest.mark.parametrize("deviation", [0.1, 0.0])
def test_exact_guidance_by_an_independent_recursion(deviation: float) -> None:
    """Ancestral sampling of the posterior as the score term is usually inserted, mean += (b / sqrt r) grad log p(y | x_t) with
    the prior's own x0, in numpy from the betas: no level, no posterior denoiser, no sampler of ours."""
    problem = reference_problem("pool2", deviation)
    c, a, y = problem.covariance.numpy(), problem.operator.numpy(), problem.y.numpy()
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times, eye = [*range(0, 1000, 25)][::-1], np.eye(8)
    mean, covariance = np.zeros(8), np.eye(8)
    for t, s in zip(times, [*times[1:], -1], strict=True):
        bar, last = bars[t], bars[s] if s >= 0 else 1.0
        r, b = bar / last, 1 - bar / last
        j = np.sqrt(bar) * c @ np.linalg.inv(bar * c + (1 - bar) * eye)
        of_y = a @ (c - np.sqrt(bar) * j @ c) @ a.T + deviation**2 * np.eye(4)
        pull = j.T @ a.T @ np.linalg.inv(of_y)
        f = np.sqrt(last) * b / (1 - bar) * j + np.sqrt(r) * (1 - last) / (1 - bar) * eye - b / np.sqrt(r) * pull @ a @ j
        mean = f @ mean + b / np.sqrt(r) * pull @ y
        covariance = f @ covariance @ f.T + b * (1 - last) / (1 - bar) * eye
    posterior = Gaussian(problem.mean, problem.covariance).measured(problem.operator, problem.y, deviation)
    ours = outcome(posterior, levels.leading(VP.linear(), 40, offset=0), DDPM("small"), (8,))
    assert np.abs(ours[0].numpy() - mean).max() < 1e-10
    assert np.abs(ours[1].numpy() - covariance).max() < 1e-10


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(0.7), DPM2M(), Heun("x0"), Heun("flow"), DDPM("large"), Renoise(0.85)])
def test_the_map_is_the_walk(sampler: Sampler) -> None:
    """Without noise, for any x: also for samplers that remember, and from pure noise."""
    walk = levels.trailing(VP.cosine().zero_terminal(), 12)
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, end = read_walk(PRIOR, walk, sampler, SHAPE), sample(PRIOR, x, walk, sampler, NoNoise(x))
    assert torch.allclose(x.reshape(3, 8) @ found.matrix.T + found.offset, end.reshape(3, 8), atol=1e-10)
    assert (float(found.covariance.abs().max()) == 0) == (sampler in (DDIM(0.0), DPM2M(), Heun("x0"), Heun("flow")))


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDIM(0.4), DDIM(1.0), DDPM("small"), DDPM("large"), Renoise(0.85)])
def test_the_mean_of_exact_guidance_is_exact(sampler: Sampler) -> None:
    """At every number of steps and every eta, by the tower property; only the covariance carries the steps' error."""
    problem = reference_problem("mask4", 0.1)
    posterior = Gaussian(PRIOR.mean, PRIOR.covariance).measured(problem.operator, problem.y, 0.1)
    for steps in (3, 20):
        mean, _ = outcome(posterior, levels.trailing(VP.cosine().zero_terminal(), steps), sampler, (8,))
        assert float((mean - posterior.mean).abs().max()) < 1e-10


def test_walks_compose() -> None:
    """Two halves in a row are the whole; and a scaled start is carried as it is."""
    walk, sampler = levels.trailing(VP.linear(), 20), DDIM(0.5)
    halves = read_walk(PRIOR, walk[:8], sampler, SHAPE).then(read_walk(PRIOR, walk[7:], sampler, SHAPE))
    whole = read_walk(PRIOR, walk, sampler, SHAPE)
    close(halves, whole)
    edm = [Level(1.0, 5.0), Level(1.0, 1.0), CLEAN]
    expected = read_walk(PRIOR, edm, DPM2M(), SHAPE).carry(torch.zeros(8).double(), 25 * torch.eye(8).double())
    for ours, theirs in zip(outcome(PRIOR, edm, DPM2M(), SHAPE), expected, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
def test_a_network_of_any_prediction_is_walked_alike(prediction: Any) -> None:
    path = VP.linear()
    model = Model(ExactNetwork((PRIOR,), path, prediction), path, prediction).bind(Cond())
    walk = levels.leading(path, 20)
    close(read_walk(model, walk, DDIM(0.6), SHAPE), read_walk(PRIOR, walk, DDIM(0.6), SHAPE))


FAR = Mixture.isotropic(torch.tensor([0.5, 0.5]), torch.stack([SPAN, -SPAN]), 0.5)
REFUSED: dict[str, tuple[Denoiser, Sampler]] = {
    **{way: (PRIOR, Wayward(way)) for way in ("clips", "couples the batch", "draws if small", "draws if large", "multiplies")},
    "mixture": (FAR, DDIM(0.0)),
    "folds": (lambda x, level: Estimate(x.abs(), x), DDIM(0.0)),
    "not a number": (lambda x, level: Estimate(x / 0, x), DDIM(0.0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_affine_is_refused(name: str) -> None:
    denoise, sampler = REFUSED[name]
    with pytest.raises(UsageError, match="not affine"):
        read_walk(denoise, levels.trailing(VP.linear(), 5), sampler, (8,))
