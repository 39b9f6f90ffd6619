"""What a network predicts: the noise, the velocity, the clean image or the flow. The only file that knows the difference.

Each value has `x0` and `noise`, which read an output, and `target`, their inverse, which makes one. All three are exact for
any (alpha, sigma), on the VP circle or off it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level


class Prediction(Protocol):
    """How an output is read. Tensors are [B,C,H,W]; `x` lies at `level`."""

    @property
    def name(self) -> str:
        """eps, v, x0 or flow."""

    def x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """The clean image that an output implies."""

    def noise(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """The noise that an output implies."""

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The output that a perfect network would give."""


@dataclass(frozen=True)
class Eps:
    """Predicts the noise. Denoising Diffusion Probabilistic Models, Ho et al. 2020, arXiv 2006.11239, eq. 11."""

    name: str = "eps"

    def x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(x - sigma eps) / alpha. Raises UsageError at alpha = 0, where noise says nothing of x0."""
        if not isinstance(level.alpha, Tensor) and level.alpha == 0:
            raise UsageError("an eps network cannot start at alpha = 0 (zero-terminal SNR, pure noise); use v, x0 or flow")
        return (x - level.sigma * out) / level.alpha

    def noise(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """The output itself."""
        return out

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The noise."""
        return noise


@dataclass(frozen=True)
class V:
    """Predicts v = alpha noise - sigma x0.

    Progressive Distillation for Fast Sampling, Salimans and Ho 2022, arXiv 2202.00512, appendix D; divided by
    alpha^2 + sigma^2 when read, so that it holds off the VP circle too.
    """

    name: str = "v"

    def x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(alpha x - sigma v) / (alpha^2 + sigma^2)."""
        a, s = level
        return (a * x - s * out) / (a * a + s * s)

    def noise(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(sigma x + alpha v) / (alpha^2 + sigma^2)."""
        a, s = level
        return (s * x + a * out) / (a * a + s * s)

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """alpha noise - sigma x0."""
        return level.alpha * noise - level.sigma * x0


@dataclass(frozen=True)
class X0:
    """Predicts the clean image."""

    name: str = "x0"

    def x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """The output itself."""
        return out

    def noise(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(x - alpha x0) / sigma; zeros at sigma = 0."""
        return level.noise(x, out)

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """The clean image."""
        return x0


@dataclass(frozen=True)
class FlowTo:
    """Predicts noise - x0. Flow Straight and Fast, Liu et al. 2022, arXiv 2209.03003, eq. 1 (its time runs the other way)."""

    name: str = "flow"

    def x0(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(x - sigma v) / (alpha + sigma)."""
        return (x - level.sigma * out) / (level.alpha + level.sigma)

    def noise(self, x: Tensor, out: Tensor, level: Level) -> Tensor:
        """(x + alpha v) / (alpha + sigma)."""
        return (x + level.alpha * out) / (level.alpha + level.sigma)

    def target(self, x0: Tensor, noise: Tensor, level: Level) -> Tensor:
        """noise - x0."""
        return noise - x0


EPS, VELOCITY, CLEAN_IMAGE, FLOW = Eps(), V(), X0(), FlowTo()
PREDICTIONS: dict[str, Prediction] = {p.name: p for p in (EPS, VELOCITY, CLEAN_IMAGE, FLOW)}
