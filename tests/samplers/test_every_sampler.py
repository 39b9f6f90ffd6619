"""Laws that hold for every registered sampler in all its variants; a new one joins by its row in the registry."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import (
    CLEAN,
    CLEAN_IMAGE,
    FLOW,
    VELOCITY,
    VP,
    Cond,
    Flow,
    Gaussian,
    Level,
    Model,
    Noise,
    UsageError,
    build,
    levels,
    registry,
    sample,
    trajectory,
)
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.model import Estimate, guided
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler

Close = Callable[[Tensor, Tensor, float], None]


def variants() -> Iterator[Any]:
    """Every sampler with its defaults, each choice of its Literal fields, and eta 0, a half and 1."""
    for name in registry.KINDS["sampler"]:
        module, _, cls = registry.target("sampler", name).partition(":")
        hints = typing.get_type_hints(getattr(importlib.import_module(module), cls))
        rows: list[dict[str, Any]] = [{}]
        for field, hint in hints.items():
            if typing.get_origin(hint) is typing.Literal:
                rows += [{field: value} for value in typing.get_args(hint)]
            if field == "eta":
                rows += [{field: value} for value in (0.0, 0.5, 1.0)]
        for row in rows:
            yield pytest.param(build("sampler", name, **row), id="-".join([name, *map(str, row.values())]))


every = pytest.mark.parametrize("sampler", list(variants()))


def with_variance(denoise: Callable[[Tensor, Level], Estimate]) -> Callable[[Tensor, Level], Estimate]:
    """The denoiser of a network that also learned a variance, so that every variant can run."""
    return lambda x, level: denoise(x, level)._replace(log_var=0.5 * torch.ones_like(x))


WALKS = {
    "flow from pure noise": levels.linspace(Flow(), 7),
    "zero-terminal table": levels.trailing(VP.scaled_linear().zero_terminal(), 7),
    "table": levels.leading(VP.linear(), 7),
    "one step from pure noise": [Level(0.0, 1.0), CLEAN],
    "one step": [Level(0.6, 0.8), CLEAN],
    "a level twice": [Level(0.3, 0.9), Level(0.6, 0.8), Level(0.6, 0.8), Level(0.8, 0.6), CLEAN],
    "hardly any noise": [Level(1.0, 1e-4), Level(1.0, 1e-8), CLEAN],
    "stops before clean": [Level(0.0, 1.0), Level(0.5, 0.5), Level(0.9, 0.1)],
}


@every
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS.keys())
def test_end_points_are_finite_or_refused_by_name(prior: Gaussian, noise: Noise, sampler: Sampler, walk: list[Level]) -> None:
    end, refusal = None, ""
    try:
        end = sample(with_variance(prior), sampler.start(noise.start(), walk[0]), walk, sampler, noise)
    except UsageError as error:
        refusal = str(error)
    if end is None:
        assert walk[0].alpha == 0
        assert "alpha = 0" in refusal
        return
    assert end.dtype == torch.float64
    assert torch.isfinite(end).all()
    assert end.abs().max() < 20


@every
@pytest.mark.parametrize("coordinates", ["flow", "ve", "any"])
def test_the_same_images_on_every_path(prior: Gaussian, noise: Noise, close: Close, sampler: Sampler, coordinates: str) -> None:
    """Each level scaled by a factor of its own, also the clean one: x scales with it, x0 and noise do not notice."""
    walk = levels.leading(VP.scaled_linear(), 9)
    factors = {
        "flow": [1 / (lv.alpha + lv.sigma) for lv in walk],
        "ve": [1 / lv.alpha for lv in walk],
        "any": [0.3 + (7 * i % 10) / 3 for i in range(len(walk))],
    }[coordinates]
    carried = [Level(c * lv.alpha, c * lv.sigma) for c, lv in zip(factors, walk, strict=True)]
    here = trajectory(with_variance(prior), sampler.start(noise.start(), walk[0]), walk, sampler, noise)
    there = trajectory(with_variance(prior), sampler.start(noise.start(), carried[0]), carried, sampler, noise)
    for a, b, factor in zip(here, there, factors[1:], strict=True):
        close(b.estimate.x0, a.estimate.x0, 1e-10)
        close(b.estimate.noise, a.estimate.noise, 1e-9)
        close(b.x, a.x * factor, 1e-10)


@every
@pytest.mark.parametrize("size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(prior: Gaussian, sampler: Sampler, size: int) -> None:
    """Image k of any batch: start noise bit-equal, result within 1e-4 in fp32."""
    walk = levels.leading(VP.scaled_linear(), 6)

    def run(seeds: tuple[int, ...]) -> Tensor:
        noise = Noise(seeds, (2, 2, 2))
        return sample(with_variance(prior), sampler.start(noise.start(), walk[0]), walk, sampler, noise)

    whole = run(tuple(range(7)))
    parts = torch.cat([run(tuple(range(k, min(7, k + size)))) for k in range(0, 7, size)])
    assert whole.dtype == torch.float32
    assert float((whole - parts).abs().max() / whole.abs().max()) < 1e-4


@every
@pytest.mark.parametrize(("scale", "branches"), [(1.0, {"cond"}), (3.0, {"cond", "uncond"})])
def test_evaluations_are_counted_exactly(
    prior: Gaussian, noise: Noise, sampler: Sampler, scale: float, branches: set[str]
) -> None:
    """`calls` a step and one into clean, for each branch that is needed and each image; the network saw as many."""
    seen = 0
    network = ExactNetwork((prior,), Flow(), FLOW)

    def counting(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        nonlocal seen
        seen += len(x)
        out = network(x, time, cond)
        return torch.cat([out, torch.zeros_like(out)], dim=1)

    model = Model(counting, Flow(), FLOW)
    run = model.branches(cond=Cond(), uncond=Cond())
    walk = levels.linspace(Flow(), 5)[1:]
    end = sample(guided(run, CFG(scale)), noise.start(), walk, sampler, noise)
    each = 3 * (sampler.calls * (len(walk) - 1) - (sampler.calls - 1)) if sampler.calls else run.evaluations["cond"]
    assert torch.isfinite(end).all()
    assert run.evaluations == model.evaluations == dict.fromkeys(branches, each)
    assert seen == each * len(branches)


@every
def test_a_sampler_keeps_nothing_between_runs(prior: Gaussian, noise: Noise, sampler: Sampler) -> None:
    """Same sampler, walk and noise twice, another walk between: the same bits."""
    walk = levels.leading(VP.scaled_linear(), 5)

    def run() -> Tensor:
        return sample(with_variance(prior), sampler.start(noise.start(), walk[0]), walk, sampler, noise)

    first = run()
    sample(with_variance(prior), noise.start(), walk[1:], sampler, noise)
    assert torch.equal(first, run())


@every
def test_a_perfect_network_of_a_point_is_reached_in_one_step(noise: Noise, sampler: Sampler) -> None:
    """Where x0 is certain every sampler returns it, on every prediction that can start at alpha = 0."""
    target = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 2, 2)
    point = Gaussian.isotropic(target, 0.0)
    for prediction in (VELOCITY, CLEAN_IMAGE, FLOW):
        path = VP.linear().zero_terminal()
        walk, denoise = levels.trailing(path, 4)[1:], Model(ExactNetwork((point,), path, prediction), path, prediction)
        end = sample(with_variance(denoise.bind(Cond())), noise.start(), walk, sampler, noise)
        assert torch.allclose(end, target.expand_as(end), atol=1e-9)


class Forbidden:
    """Noise that must not be drawn."""

    def at(self, index: int) -> StepNoise:
        def draw(tag: str = "step") -> Tensor:
            raise AssertionError("drew noise")

        return draw


@every
def test_nothing_is_drawn_that_is_not_used(prior: Gaussian, noise: Noise, sampler: Sampler) -> None:
    """No noise in a step into clean, none at all where eta is 0."""
    walk = levels.leading(VP.scaled_linear(), 4)
    for part in [walk[-2:]] + [walk] * (getattr(sampler, "eta", None) == 0):
        assert torch.isfinite(sample(with_variance(prior), noise.start(), part, sampler, Forbidden())).all()
