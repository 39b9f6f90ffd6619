"""Which noise levels are trained: distributions over a path, each a function of one standard normal draw per sample.

Where a path is a table (`discrete`), a level is moved to the nearest entry, so that only levels are trained that are sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path


class Levels(Protocol):
    """A distribution of levels over a path."""

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels for standard normal draws [B] -> ([B,1,1,1], [B,1,1,1])."""


@dataclass(frozen=True)
class Uniform:
    """Every time of the path's own clock alike: whole indices of a table, u on the flow path.

    Denoising Diffusion Probabilistic Models, Ho et al. 2020, arXiv 2006.11239, algorithm 1.
    """

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels of uniform times."""
        return _by_clock(torch.special.ndtr(normal.double()), normal, path)


@dataclass(frozen=True)
class Cubic:
    """Times (1 - q^3) of the path's own clock for uniform q: half of the visits are in the noisiest eighth, where the layout
    of a picture is settled.

    T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models, Mou et al. 2023,
    arXiv 2302.08453, section 3.3 and its figure of sampling strategies.
    """

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels of those times."""
        return _by_clock(1 - torch.special.ndtr(-normal.double()) ** 3, normal, path)  # q falls in the draw


@dataclass(frozen=True)
class LogitNormal:
    """u = sigmoid(mean + deviation * normal): most visits near sigmoid(mean), none at the ends.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al. 2024, arXiv 2403.03206, eq. 19.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels (1 - u, u)."""
        return _at(torch.sigmoid(self.mean + self.deviation * normal), path)


@dataclass(frozen=True)
class Mode:
    """u = 1 - q - scale (cos^2(pi q / 2) - 1 + q) for uniform q: uniform at scale 0, the middle favoured above it.

    Esser et al. 2024, arXiv 2403.03206, eq. 20. scale: -1 to 2 / (pi - 2) = 1.75, where u stays monotonic in q.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UsageError(f"mode: scale is {self.scale}; it takes -1 to {2 / (math.pi - 2):.2f}")

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels (1 - u, u)."""
        q = torch.special.ndtr(-normal)  # falling in the draw, so that u rises with it
        return _at(1 - q - self.scale * ((math.pi / 2 * q).cos().square() - 1 + q), path)


@dataclass(frozen=True)
class Beta:
    """u ~ Beta(a, b); a over b favours noise.

    The distribution of pi0: A Vision-Language-Action Flow Model, Black et al. 2024, arXiv 2410.24164, appendix B, whose time
    runs the other way (there Beta(1.5, 1) leans to noise: here a = 1.5, b = 1).
    """

    a: float = 1.5
    b: float = 1.0

    def __post_init__(self) -> None:
        if min(self.a, self.b) <= 0:
            raise UsageError(f"beta: a and b must be above 0, not {self.a:g} and {self.b:g}")

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels (1 - u, u)."""
        from scipy.special import betaincinv

        u = betaincinv(self.a, self.b, torch.special.ndtr(normal.double()).cpu().numpy())
        return _at(torch.from_numpy(np.asarray(u)).to(normal), path)


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) = mean + deviation * normal.

    Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al. 2022, arXiv 2206.00364, table 1 (data of
    standard deviation 0.5, as EDM's path has it).
    """

    mean: float = -1.2
    deviation: float = 1.2

    def __call__(self, normal: Tensor, path: Path) -> Level:
        """Levels of that ratio."""
        return _at(torch.sigmoid(self.mean + self.deviation * normal), path)  # u = r / (1 + r)


LEVELS: dict[str, type] = {
    "uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "beta": Beta, "log_normal": LogNormal,
    "cubic": Cubic,
}  # fmt: skip


def _at(u: Tensor, path: Path) -> Level:
    """The levels at u [B]."""
    if path.discrete:
        times = [float(path.time(Level(1 - v, v))) for v in u.double().tolist()]
        return _stacked([path.level(round(t)) for t in times], u)
    column = u[:, None, None, None]
    return Level(1 - column, column)


def _by_clock(part: Tensor, like: Tensor, path: Path) -> Level:
    """The levels at parts 0..1 of the path's clock: whole entries of a table, all as often where parts are uniform."""
    if path.discrete:
        return _stacked([path.level(min(math.floor(p * (path.last + 1)), path.last)) for p in part.tolist()], like)
    return _stacked([path.level(path.first + p * (path.last - path.first)) for p in part.tolist()], like)


def _stacked(levels: list[Level], like: Tensor) -> Level:
    alpha, sigma = (torch.tensor([float(v) for v in side]) for side in zip(*levels, strict=True))
    return Level(alpha.to(like)[:, None, None, None], sigma.to(like)[:, None, None, None])
