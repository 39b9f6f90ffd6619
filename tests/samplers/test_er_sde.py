"""ER-SDE: DDIM and Euler at its two ends, and its step as the integrals that the paper states, summed by brute force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ldm_pipe import VP, Flow, Gaussian, Level, Noise, levels, sample, trajectory
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.er_sde import ERSDE

Close = Callable[[Tensor, Tensor, float], None]
PHI: dict[str, Callable[[Any], Any]] = {
    "er": lambda u: u * (np.exp(u**0.3) + 10),
    "sde": lambda u: u**2,
    "ode": lambda u: u,
}


@pytest.mark.parametrize(("scale", "eta"), [("sde", 1.0), ("ode", 0.0)])
def test_order_one_is_ddim(prior: Gaussian, noise: Noise, close: Close, scale: Any, eta: float) -> None:
    for walk in (levels.leading(VP.linear(), 9), levels.linspace(Flow(), 9)[1:]):
        ours, ddim = (sample(prior, noise.start(), walk, s, noise) for s in (ERSDE(1, scale), DDIM(eta)))
        close(ours, ddim, 1e-12)


@pytest.mark.parametrize("scale", PHI)
def test_the_steps_are_the_papers_integrals(prior: Gaussian, noise: Noise, close: Close, scale: Any) -> None:
    """In y = x / alpha, with the parabola through three x0 in Newton's form and sums over 200,000 points."""
    phi, walk = PHI[scale], [Level(0.2, 0.8), Level(0.35, 0.7), Level(0.5, 0.5), Level(0.9, 0.2)]
    steps = list(trajectory(prior, noise.start(), walk, ERSDE(3, scale), noise))
    r, s, t = (lv.ratio for lv in walk[:3])
    end = walk[3].ratio
    m2, m1, m0 = (done.estimate.x0 for done in steps)
    first, before = (m0 - m1) / (t - s), (m1 - m2) / (s - r)
    second = (first - before) / (t - r)
    u = np.geomspace(end, t, 200_001)
    middle, falls = (u[1:] * u[:-1]) ** 0.5, phi(end) * (1 / phi(u[:-1]) - 1 / phi(u[1:]))  # phi' / phi^2 du, exactly
    still, line, parabola = (float((falls * g).sum()) for g in (1 + 0 * middle, middle - t, (middle - t) * (middle - s)))
    y = phi(end) / phi(t) * steps[1].x / 0.5 + still * m0 + line * first + parabola * second
    y = y + max(0.0, end**2 - (t * phi(end) / phi(t)) ** 2) ** 0.5 * noise.at(2)("step")
    close(steps[2].x / 0.9, y, 1e-7)
