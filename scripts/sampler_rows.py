"""The rows of `samplers.py`: what exact propagation of a Gaussian says of a sampler."""

from __future__ import annotations

import math
from typing import Any

import torch

from ldm_pipe import VP, Flow, Gaussian, Level, build, levels
from ldm_pipe.analysis import cost, distance, reference_problem
from ldm_pipe.walk import Sampler

BUDGETS = (5, 10, 20, 50)


def prior() -> Gaussian:
    """The reference problem's covariance, with a mean."""
    covariance = reference_problem("pool2", 0.0).covariance
    return Gaussian(torch.arange(len(covariance), dtype=torch.float64).sin(), covariance)


def order(x0: Gaussian, sampler: Sampler) -> float | None:
    """The power of the step by which that distance falls. The first step shrinks as a square: a low order there is hidden."""
    if not sampler.calls or getattr(sampler, "corrections", 0):
        return None  # steps of its own, or known from draws only

    def walk(count: int) -> list[Level]:
        return [Flow().level(1000 * (1 - 0.9 * (i / count) ** 2)) for i in range(count + 1)]

    coarse, fine = (distance(x0, sampler, walk(n)) for n in (40, 80))
    return round(math.log2(coarse / fine), 2)


def within(name: str, budget: int, path: Any) -> tuple[Sampler, list[Level]] | None:
    """The sampler and the most levels (or the finest tolerance) that `budget` evaluations allow; None where none do."""
    sampler = build("sampler", name)
    if sampler.calls:
        tries = [(sampler, levels.trailing(path, steps)) for steps in range(max(1, budget // 3), budget + 1)]
    else:
        tries = [(build("sampler", name, tolerance=10 ** (-k / 4)), levels.trailing(path, 1)) for k in range(1, 33)]
    fit = [pair for pair in tries if cost(prior(), *pair).evaluations <= budget]
    return fit[-1] if fit else None


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    sampler, x0 = build("sampler", name), prior()
    row: dict[str, Any] = {"calls": sampler.calls or None, "order": order(x0, sampler), "w2": {}}
    row["draws"] = cost(x0, sampler, levels.trailing(VP.linear(), 30)).draws
    for budget in BUDGETS:
        found = within(name, budget, VP.linear())
        row["w2"][budget] = float(f"{distance(x0, *found):.3g}") if found else None
    return row
