"""The paths that networks were trained on: VP from any beta table, rectified flow, EDM."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Scalar


@dataclass(frozen=True)
class VP:
    """Variance preserving: alpha^2 + sigma^2 = 1, from a table of cumulative products abar[0..T-1], falling.

    Denoising Diffusion Probabilistic Models, Ho et al. 2020, arXiv 2006.11239, eq. 4. Between table entries the
    logarithm of sigma / alpha is interpolated.
    """

    table: tuple[float, ...] = field(repr=False)
    name: str = "table"
    discrete: bool = True
    data_std: float = 1.0
    _keys: tuple[float, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.table, self.table[1:], strict=False))
        if not (self.table and falling and self.table[-1] >= 0 and self.table[0] < 1):
            raise UsageError("a VP table must fall strictly within 1..0")
        object.__setattr__(self, "_keys", tuple(float(self.level(i).u) for i in range(len(self.table))))

    @classmethod
    def from_betas(cls, betas: list[float], name: str = "table") -> VP:
        """From the variances beta_t of the forward steps."""
        product, table = 1.0, []
        for beta in betas:
            product *= 1 - beta
            table.append(product)
        return cls(tuple(table), name)

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> VP:
        """DDPM's schedule (Ho et al. 2020, section 4)."""
        return cls.from_betas([start + (end - start) * i / (steps - 1) for i in range(steps)], "linear")

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VP:
        """Stable Diffusion's schedule: linear in sqrt(beta) (Rombach et al. 2022, arXiv 2112.10752)."""
        a, b = math.sqrt(start), math.sqrt(end)
        return cls.from_betas([(a + (b - a) * i / (steps - 1)) ** 2 for i in range(steps)], "scaled_linear")

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, most: float = 0.999) -> VP:
        """Improved DDPM, Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17."""

        def f(t: float) -> float:
            return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

        return cls.from_betas([min(1 - f((i + 1) / steps) / f(i / steps), most) for i in range(steps)], "cosine")

    def zero_terminal(self) -> VP:
        """The same table with alpha = 0 at the last step and the first step kept.

        Common Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al. 2023, arXiv 2305.08891, algorithm 1.
        """
        roots = [math.sqrt(a) for a in self.table]
        scale = roots[0] / (roots[0] - roots[-1])
        return VP(tuple(((r - roots[-1]) * scale) ** 2 for r in roots), f"{self.name}, zero terminal")

    @property
    def first(self) -> float:
        """Time of the least noise."""
        return 0.0

    @property
    def last(self) -> float:
        """Time of the most noise."""
        return float(len(self.table) - 1)

    def level(self, time: float) -> Level:
        """The level of a table index, or between two."""
        i = min(int(time), len(self.table) - 2) if len(self.table) > 1 else 0
        part = time - i
        if part == 0 or part == 1:
            a = self.table[i + int(part)]
            return Level(math.sqrt(a), math.sqrt(1 - a))
        low, high = self.level(i), self.level(i + 1)
        if high.alpha == 0:  # the ratio has no logarithm there
            u = float(low.u) + part * (1 - float(low.u))
            return self.rescale(Level(1 - u, u))[1]
        ratio = math.exp((1 - part) * math.log(low.ratio) + part * math.log(high.ratio))
        return self.rescale(Level(1.0, ratio))[1]

    def time(self, level: Level) -> Scalar:
        """The table index of a level, fractional between entries, clamped to 0..T-1."""
        alpha, sigma = level
        if isinstance(alpha, Tensor) and isinstance(sigma, Tensor):
            rows = zip(alpha.flatten().tolist(), sigma.flatten().tolist(), strict=True)
            return alpha.new_tensor([float(self.time(Level(a, s))) for a, s in rows]).reshape(alpha.shape)
        u = float(level.u)
        i = bisect.bisect_right(self._keys, u) - 1
        if i < 0 or len(self.table) == 1:
            return 0.0
        if i >= len(self.table) - 1:
            return self.last
        low, high = self.level(i), self.level(i + 1)
        if high.alpha == 0:
            return i + (u - float(low.u)) / (1 - float(low.u))
        return i + (math.log(level.ratio) - math.log(low.ratio)) / (math.log(high.ratio) - math.log(low.ratio))

    def rescale(self, level: Level) -> tuple[Scalar, Level]:
        """Onto the circle alpha^2 + sigma^2 = 1."""
        h = _hypot(level.alpha, level.sigma)
        return 1 / h, Level(level.alpha / h, level.sigma / h)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x = (1 - u) x0 + u noise; the network's clock is u * scale.

    Flow Straight and Fast, Liu et al. 2022, arXiv 2209.03003; with Stable Diffusion 3's clock (Esser et al. 2024,
    arXiv 2403.03206).
    """

    scale: float = 1000.0
    discrete: bool = False
    data_std: float = 1.0

    @property
    def first(self) -> float:
        """Time of the least noise that the usual spacings begin with: a thousandth of the way."""
        return self.scale / 1000

    @property
    def last(self) -> float:
        """Time of pure noise."""
        return self.scale

    def level(self, time: float) -> Level:
        """The level at time u * scale."""
        u = time / self.scale
        return Level(1 - u, u)

    def time(self, level: Level) -> Scalar:
        """u * scale."""
        return level.u * self.scale

    def rescale(self, level: Level) -> tuple[Scalar, Level]:
        """Onto the line alpha + sigma = 1."""
        h = level.alpha + level.sigma
        return 1 / h, Level(level.alpha / h, level.sigma / h)


@dataclass(frozen=True)
class EDM:
    """Variance exploding with EDM's preconditioning: x = x0 + sigma noise, clock ln(sigma) / 4.

    Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al. 2022, arXiv 2206.00364, table 1.
    Its c_in, c_skip and c_out are what `rescale` and the v prediction give together: with s = data_std and
    h = hypot(sigma, s), the network takes x / h at the level (s / h, sigma / h) and D = s * x0' has c_skip = s^2 / h^2 and
    c_out = -sigma s / h. (EDM's own F has the other sign: F = -v.)
    """

    data_std: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    discrete: bool = False

    @property
    def first(self) -> float:
        """ln(sigma_min) / 4."""
        return math.log(self.sigma_min) / 4

    @property
    def last(self) -> float:
        """ln(sigma_max) / 4."""
        return math.log(self.sigma_max) / 4

    def level(self, time: float) -> Level:
        """The level (1, e^(4 time))."""
        return Level(1.0, math.exp(4 * time))

    def time(self, level: Level) -> Scalar:
        """ln(sigma / alpha) / 4. Raises UsageError at alpha = 0 and at sigma = 0, where EDM has no time."""
        if isinstance(level.alpha, Tensor):
            return (level.sigma / level.alpha).log() / 4  # type: ignore[union-attr]
        if level.alpha == 0 or level.sigma == 0:
            raise UsageError(f"an EDM network has no time at alpha={level.alpha:g}, sigma={level.sigma:g}")
        return math.log(level.ratio) / 4

    def rescale(self, level: Level) -> tuple[Scalar, Level]:
        """Onto the circle, with x0 / data_std as the clean image."""
        a = level.alpha * self.data_std
        h = _hypot(a, level.sigma)
        return 1 / h, Level(a / h, level.sigma / h)


def _hypot(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (a * a + b * b) ** 0.5
    return math.hypot(a, b)
