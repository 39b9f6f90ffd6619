"""The noises of a stochastic sampler that make a given picture: exact round trips, and noises that are noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ldm_pipe import VP, Flow, Level, Noise, UsageError, build, sample
from ldm_pipe.editing.dpm_encoder import END, DPMEncoder
from ldm_pipe.editing.invert import Remake
from ldm_pipe.level import Path

PICTURE = torch.tensor([0.8, -0.5, 1.2, 0.3], dtype=torch.float64).reshape(1, 4, 1, 1)
Made = Callable[..., Remake]
SAMPLERS = [("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.3}), ("ddpm", {}), ("ddpm", {"variance": "large"}),
            ("euler_ancestral", {}), ("renoise", {})]  # fmt: skip


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize(("name", "fields"), SAMPLERS)
@pytest.mark.parametrize("path", [VP.scaled_linear(), Flow()], ids=["vp", "flow"])
def test_the_round_trip_is_exact_under_guidance(
    remake: Made, path: Path, name: str, fields: dict[str, float], independent: bool
) -> None:
    run = remake(build("sampler", name, **fields), steps=12, rows=3, path=path)
    pictures = PICTURE * torch.tensor([1.0, -3.0, 0.0]).reshape(3, 1, 1, 1)
    found = DPMEncoder(independent)(pictures, run)
    assert found.noise is not None
    back = sample(run.guided, found.x, found.levels, run.sampler, found.noise)
    assert float((back - pictures).abs().max()) < 1e-10
    assert float(found.error.max()) < 1e-10
    assert found.levels == (*run.levels[:-1], END)
    one = sample(run.guided, found.x, found.levels, run.sampler, replace(found.noise, draws=(found.noise.draws[0],) * 12))
    assert float((one - pictures).abs().max()) > 1e-3  # each step has its own


def test_one_evaluation_a_step_and_the_run(remake: Made) -> None:
    run = remake(build("sampler", "ddpm"), steps=9)
    DPMEncoder()(PICTURE, run)
    assert dict(run.branches.evaluations) == {"cond": 18, "uncond": 18}


def test_noises_of_the_prior_are_standard_normal_and_independent_draws_are_larger(remake: Made) -> None:
    """Pictures drawn from the model's own distribution, small steps: what is found is what the sampler draws."""
    rows = 400
    run = remake(build("sampler", "ddpm"), steps=100, scale=1, rows=rows)
    root = torch.linalg.cholesky(0.7 ** (torch.arange(4)[:, None] - torch.arange(4)).abs().double())
    flat = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ root.T
    found = {k: DPMEncoder(k)(flat.reshape(rows, 4, 1, 1), run).noise for k in (False, True)}
    chain, anew = ([n.draws[k].std().item() for k in range(10, 90, 10)] for n in found.values() if n is not None)
    assert max(abs(s - 1) for s in chain) < 0.07
    assert min(anew) > 1.2


def test_the_first_x_and_the_draws_follow_the_seeds(remake: Made) -> None:
    run = remake(build("sampler", "ddpm"), steps=5, rows=2)
    pictures = PICTURE.repeat(2, 1, 1, 1)
    first, again = DPMEncoder()(pictures, run), DPMEncoder()(pictures, run)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x[0], first.x[1])
    swapped = DPMEncoder()(pictures, replace(run, draws=Noise((1, 0), (4, 1, 1), dtype=torch.float64)))
    torch.testing.assert_close(swapped.x, first.x.flip(0), rtol=0, atol=1e-12)
    assert first.noise is not None
    assert torch.equal(first.noise.take([1]).at(3)("any"), first.noise.draws[3][1:])


def test_edit_friendly_levels_are_noised_alone(remake: Made) -> None:
    """x at the first level is the picture mixed with that level's own draw."""
    run = remake(build("sampler", "ddpm"), steps=5)
    assert torch.equal(DPMEncoder(True)(PICTURE, run).x, run.levels[0].mix(PICTURE, run.draws.at(0)("forward")))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [("ddim", {}, "no mean"), ("dpm2m", {}, "keeps a memory"), ("heun", {}, "no mean"), ("dpm_sde", {}, "no mean")],
)
def test_what_is_no_mean_and_noise_is_refused_by_name(remake: Made, name: str, fields: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DPMEncoder()(PICTURE, remake(build("sampler", name, **fields), steps=4))


def test_a_walk_that_ends_in_noise_is_left_as_it_is(remake: Made) -> None:
    run = remake(build("sampler", "ddpm"), steps=6)
    short = replace(run, levels=run.levels[:-1])
    assert DPMEncoder()(PICTURE, short).levels == short.levels
    assert isinstance(END, Level)
