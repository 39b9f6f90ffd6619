"""Polynomials through what a multistep sampler has seen, integrated over its step: the mathematics that they share.

A first-order step holds x0 and noise still: `there.mix(x0, noise)`. A multistep method lets one of them move along the Lagrange
polynomial through its last values v_j at places t_j, and adds to the first-order step the integral over the step of

    sum_j (v_j - v_0) l_j(t)        with v_0 the value held still.

What differs between the methods is the place (sigma / alpha, or lambda = log(alpha / sigma)), the value and the weight under
the integral. Integrals are 24-point Gauss-Legendre sums: exact for polynomials, and to rounding under an exponential weight for
steps of up to about 30 nats. With one value there is nothing to add, so that order 1 is Euler to the bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level

History = tuple[tuple[float, Tensor], ...]
Measure = Sequence[tuple[float, float]]


def remember(history: History | None, place: float, value: Tensor, order: int) -> History:
    """(place, value) pairs, newest first and `order` at most. A place met twice is kept once (no slope is known there), and an
    infinite one (alpha = 0) starts anew: no polynomial goes through it."""
    if math.isinf(place):
        return ()
    old = history or ()
    return ((place, value), *(old[1:] if old and same(old[0][0], place) else old))[:order]


def same(place: float, other: float) -> bool:
    """Are two places one, but for rounding?"""
    return math.isclose(place, other, rel_tol=1e-9, abs_tol=1e-9)


def lebesgue(start: float, end: float) -> Measure:
    """(place, weight) pairs whose sum of weight * f(place) is the integral of f from start to end."""
    return [(start + (end - start) * p, (end - start) * w) for p, w in _gauss()]


def exponential(start: float, end: float, rate: float) -> Measure:
    """The same for the integral of e^(rate (t - end)) f(t): exponential integrators."""
    return [(p, w * math.exp(rate * (p - end))) for p, w in lebesgue(start, end)]


def bend(history: History, measure: Measure) -> Tensor | float:
    """The integral of sum_j (v_j - v_0) l_j; 0.0 where fewer than two values are known."""
    if len(history) < 2:
        return 0.0
    nodes = [place for place, _ in history]
    weights = [sum(w * _lagrange(nodes, j, p) for p, w in measure) for j in range(1, len(nodes))]
    terms = [w * (value - history[0][1]) for w, (_, value) in zip(weights, history[1:], strict=True)]
    return functools.reduce(Tensor.add, terms)


def fall(here: Level, there: Level) -> float:
    """By which factor sigma / alpha falls, e^-h with h the step of lambda: 0 out of alpha = 0 or into sigma = 0, at most 1."""
    if there.alpha == 0:
        return 1.0
    return min(1.0, float(here.alpha * there.sigma / (there.alpha * here.sigma)))


def between(here: Level, there: Level, part: float) -> Level:
    """The level at a part (0..1) of the way in lambda. Neither may be an end point."""

    def way(a: float, b: float) -> float:
        return math.exp((1 - part) * math.log(a) + part * math.log(b))

    return Level(way(float(here.alpha), float(there.alpha)), way(float(here.sigma), float(there.sigma)))


def check_order(sampler: str, order: int, most: int, field: str = "order") -> None:
    """Raises UsageError for an order outside 1..most."""
    if not 1 <= order <= most:
        raise UsageError(f"{sampler}: {field} is {order}; it takes 1 to {most}")


def _lagrange(nodes: Sequence[float], j: int, place: float) -> float:
    return math.prod((place - n) / (nodes[j] - n) for k, n in enumerate(nodes) if k != j)


@functools.cache
def _gauss() -> list[tuple[float, float]]:
    """Nodes and weights on 0..1."""
    places, weights = np.polynomial.legendre.leggauss(24)
    return list(zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
