"""ER-SDE-Solvers: Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models, Cui et al. 2023,
arXiv 2309.06169.

With y = x / alpha and s = sigma / alpha falling to t, and a noise scale function phi:

    y' = phi(t) / phi(s) y + phi(t) int_t^s x0(u) phi'(u) / phi(u)^2 du + sqrt(t^2 - s^2 phi(t)^2 / phi(s)^2) z.

phi(u) = u is the probability-flow ODE, u^2 the reverse SDE. The paper extrapolates x0 by a Taylor series with backward
differences; here it is the polynomial through the last values, which keeps the order of each kind, and its integral needs no
sum of 200 terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldm_pipe.expansion import Measure, bend, check_order, lebesgue, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class ERSDE(Sampler):
    """ER-SDE: a multistep solver for x0 between the ODE and the reverse SDE, one evaluation a step.

    The order grows from 1 with the steps done; steps out of alpha = 0 and into sigma = 0 are first order.

    order: 1 to 3 values of x0, interpolated over sigma / alpha. scale: phi(u) = u (e^(u^0.3) + 10), the official code's default
    ("er"), u^2 ("sde") or u ("ode", which draws nothing).
    """

    order: int = 3
    scale: Literal["er", "sde", "ode"] = "er"

    def __post_init__(self) -> None:
        check_order("er_sde", self.order, 3)

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (sigma / alpha, x0) of the last `order` levels."""
        estimate = denoise(x, here)
        mixed = estimate.noise
        seen = remember(memory, here.ratio, estimate.x0, self.order)
        if there.sigma == 0:
            return Step(there.mix(estimate.x0, mixed), estimate, seen)
        # What phi(t) / phi(s) leaves of the noise: (phi(t) / t) / (phi(s) / s).
        kept = min(1.0, math.exp(self._excess(there.ratio) - self._excess(here.ratio)))
        if kept < 1:
            mixed = kept * mixed + (1 - kept**2) ** 0.5 * noise("step")
        x = there.mix(estimate.x0, mixed)
        if len(seen) > 1:
            x = x + there.alpha * bend(seen, self._measure(there.ratio, here.ratio))
        return Step(x, estimate, seen)

    def _measure(self, low: float, high: float) -> Measure:
        """phi(low) phi'(u) / phi(u)^2 du over low..high, with log u as the variable: smooth over many decades."""
        pairs = [(math.exp(v), w) for v, w in lebesgue(math.log(low), math.log(high))]
        end = math.log(low) + self._excess(low)
        return [(u, w * math.exp(end - math.log(u) - self._excess(u)) * (1 + self._growth(u))) for u, w in pairs]

    def _excess(self, u: float) -> float:
        """log(phi(u) / u)."""
        if self.scale == "ode":
            return 0.0
        if self.scale == "sde":
            return math.log(u) if u > 0 else -math.inf
        power = u**0.3
        return power + math.log1p(10 * math.exp(-power))

    def _growth(self, u: float) -> float:
        """The derivative of log(phi(u) / u) by log u."""
        if self.scale == "er":
            return 0.3 * u**0.3 / (1 + 10 * math.exp(-(u**0.3)))
        return 1.0 if self.scale == "sde" else 0.0
