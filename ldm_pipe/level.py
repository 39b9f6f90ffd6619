"""The one convention: x = alpha * x0 + sigma * noise.

Units, said once: images and x0 are -1..1 (latents: unit variance); u and `strength` are 0..1 with 1 = all noise; log_snr is
in nats of power, log(alpha^2 / sigma^2). Schedules are plain floats when sampling (exact, no device sync) and [B,1,1,1]
tensors when training.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

from torch import Tensor

Scalar = float | Tensor


class Level(NamedTuple):
    """A noise level: x = alpha * x0 + sigma * noise. alpha = 0 (all noise) and sigma = 0 (clean) are legal."""

    alpha: Scalar
    sigma: Scalar

    def mix(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x at this level, [B,C,H,W]."""
        return self.alpha * x0 + self.sigma * noise

    def noise(self, x: Tensor, x0: Tensor) -> Tensor:
        """The noise that x and x0 imply. At sigma = 0 there is none to be told: zeros."""
        if isinstance(self.sigma, float | int) and self.sigma == 0:
            return x.new_zeros(x.shape)
        return (x - self.alpha * x0) / self.sigma

    @property
    def log_snr(self) -> float:
        """log(alpha^2 / sigma^2); -inf where alpha = 0, +inf where sigma = 0. Float levels only."""
        a, s = float(self.alpha), float(self.sigma)
        return -math.inf if a == 0 else math.inf if s == 0 else 2 * (math.log(a) - math.log(s))

    @property
    def u(self) -> Scalar:
        """Where the level lies: sigma / (alpha + sigma) in 0..1, the same number on every path."""
        return self.sigma / (self.alpha + self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of variance-exploding coordinates; inf where alpha = 0. Float levels only."""
        return math.inf if self.alpha == 0 else float(self.sigma / self.alpha)


CLEAN = Level(1.0, 0.0)


def inside(level: Level, lo: float, hi: float) -> bool:
    """Does the noise u of a level lie in lo <= u < hi? hi = 1 includes u = 1."""
    u = float(level.u)
    return lo <= u < hi or hi == u == 1


class Path(Protocol):
    """Where a network lives: which levels it was trained on and how it is told the time."""

    @property
    def first(self) -> float:
        """Time of the least noise."""

    @property
    def last(self) -> float:
        """Time of the most noise."""

    @property
    def discrete(self) -> bool:
        """Were only whole times trained?"""

    @property
    def data_std(self) -> float:
        """Standard deviation of the data, which the network sees divided out."""

    def level(self, time: float) -> Level:
        """The level at a time of the network's own clock."""

    def time(self, level: Level) -> Scalar:
        """The network's own clock at a level of the same signal-to-noise ratio (a table's is clamped to first..last)."""

    def rescale(self, level: Level) -> tuple[Scalar, Level]:
        """(c, own): c * x is what the network takes for an x of `level`, and own is its level there, with x0 / data_std
        as the clean image."""
