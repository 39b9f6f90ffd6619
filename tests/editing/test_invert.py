"""Inversion: the published round trips on a Gaussian, other samplers and paths, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, UsageError, build, levels, sample
from ldm_pipe.analysis import reference_problem
from ldm_pipe.editing.invert import invert
from ldm_pipe.noise import NoNoise

PROBLEM = reference_problem("pool2", 0.0)
PRIOR = Gaussian(PROBLEM.mean, PROBLEM.covariance)
DDIM = build("sampler", "ddim")


def round_trip(steps: int, corrections: int) -> float:
    """The spectral norm of decode(encode(.)) - I, from the unit vectors."""
    unit, walk = torch.eye(8, dtype=torch.float64), levels.leading(VP.linear(), steps, offset=0)
    found = invert(PRIOR, unit, walk, DDIM, corrections)
    gap: Tensor = sample(PRIOR, found.x, walk, DDIM, NoNoise(found.x)) - unit
    assert torch.allclose(found.error, gap.square().mean(1).sqrt())
    return float(torch.linalg.matrix_norm(gap, 2))


@pytest.mark.parametrize(
    ("steps", "printed"), [(10, 0.613), (20, 0.363), (50, 0.158), (100, 0.082), (200, 0.042), (1000, 0.0084)]
)
def test_the_round_trip_is_of_first_order(steps: int, printed: float) -> None:
    assert round_trip(steps, 0) == pytest.approx(printed, abs=6e-4 if printed > 0.01 else 6e-5)


@pytest.mark.parametrize(
    ("steps", "corrections", "most"),
    [(20, 1, 0.1215), (20, 5, 0.00125), (20, 10, 4.5e-6), (20, 50, 1e-13), (50, 1, 0.0205), (50, 5, 4.7e-6), (10, 50, 6e-10)],
)
def test_corrections_bring_it_to_machine_precision(steps: int, corrections: int, most: float) -> None:
    assert round_trip(steps, corrections) <= most


@pytest.mark.parametrize(
    ("name", "fields"),
    [("euler", {}), ("heun", {"average": "ve"}), ("ddim", {}), ("heun", {"average": "flow"}), ("heun", {"average": "x0"})],
)
@pytest.mark.parametrize("path", [VP.scaled_linear(), Flow()], ids=["vp", "flow"])
def test_every_deterministic_sampler_of_single_steps(path: VP | Flow, name: str, fields: dict[str, str]) -> None:
    if fields == {"average": "ve"} and isinstance(path, Flow):
        pytest.skip("averages dx/dsigma in variance-exploding coordinates, refuses alpha = 0")
    sampler, walk = build("sampler", name, **fields), levels.trailing(path, 40)
    pictures = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(3, 8)
    found = invert(PRIOR, pictures, walk, sampler, 40)
    assert float(found.error.max()) < 1e-6
    assert float(invert(PRIOR, pictures, walk, sampler, 0).error.max()) > 1e-3


def test_the_inverse_of_the_prior_is_noise() -> None:
    """Draws of the prior go back to unit noise: the covariance of the found x is the first level's sigma^2 I + alpha^2 C."""
    walk = levels.leading(VP.linear(), 500, offset=0)
    found = invert(PRIOR, torch.eye(8, dtype=torch.float64), walk, DDIM, 3).x  # a linear map, as the mean is zero
    covariance = found.T @ PRIOR.covariance @ found
    first: Level = walk[0]
    right = float(first.alpha) ** 2 * PRIOR.covariance + float(first.sigma) ** 2 * torch.eye(8, dtype=torch.float64)
    assert float((covariance - right).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [("ddim", {"eta": 0.5}, "draws noise"), ("ddpm", {}, "draws noise"), ("dpm2m", {}, "keeps a memory")],
)
def test_what_has_no_inverse_is_refused_by_name(name: str, fields: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        invert(PRIOR, torch.eye(8, dtype=torch.float64), levels.trailing(VP.linear(), 5), build("sampler", name, **fields))


def test_levels_are_those_of_the_walk() -> None:
    walk = levels.trailing(VP.linear(), 5)
    with pytest.raises(UsageError, match="falling levels"):
        invert(PRIOR, torch.eye(8, dtype=torch.float64), walk[::-1], DDIM)
    with pytest.raises(UsageError, match="one step from pure noise"):
        invert(PRIOR, torch.eye(8, dtype=torch.float64), [Level(0.0, 1.0), Level(1.0, 0.0)], DDIM)
