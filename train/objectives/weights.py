"""How much a level counts. Every weight is said once, for the squared error of x0, and so holds for every prediction.

The outputs of all predictions are linear in x0, so the error of an output is the error of x0 divided by slope^2, where slope
is the derivative of x0 by the output. A weight W of the x0 error is therefore W slope^2 on the output's error: for min-SNR that
is min(snr, gamma) / snr on eps and min(snr, gamma) / (snr + 1) on v, as it should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.prediction import Prediction


class Weight(Protocol):
    """The weight of an output's squared error."""

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """snr: alpha^2 / sigma^2 of the network's own level, slope2: (d x0 / d output)^2, both [B] -> weight [B]."""


def slope2(prediction: Prediction, level: Level) -> Tensor:
    """(d x0 / d output)^2 at levels of [B,1,1,1]: [B]."""
    alpha = torch.as_tensor(level.alpha)
    one = torch.ones_like(alpha)
    return prediction.x0(one * 0, one, level).square().flatten()


@dataclass(frozen=True)
class Constant:
    """Every output's error counts alike: the simple loss (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(slope2)


@dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma). Efficient Diffusion Training via Min-SNR Weighting, Hang et al. 2023, arXiv 2303.09556, section 3.4."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _above_zero("min_snr", "gamma", self.gamma)

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """The weight of the output's error."""
        return snr.clamp(max=self.gamma) * slope2


@dataclass(frozen=True)
class SoftMinSNR:
    """snr gamma / (snr + gamma), the smooth form of min-SNR.

    Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers, Crowson et al. 2024,
    arXiv 2401.11605, section 4.5.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _above_zero("soft_min_snr", "gamma", self.gamma)

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """The weight of the output's error."""
        return slope2 / (1 / snr + 1 / self.gamma)


@dataclass(frozen=True)
class P2:
    """snr / (k + snr)^gamma: the clean levels count less.

    Perception Prioritized Training of Diffusion Models, Choi et al. 2022, arXiv 2204.00227, eq. 8 (there on eps).
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _above_zero("p2", "k", self.k)

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """The weight of the output's error."""
        return snr / (self.k + snr) ** self.gamma * slope2


@dataclass(frozen=True)
class Debiased:
    """sqrt(snr). Debias the Training of Diffusion Models, Yu et al. 2023, arXiv 2310.08442, eq. 10 (1 / sqrt(snr) on eps)."""

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """The weight of the output's error."""
        return snr.sqrt() * slope2


@dataclass(frozen=True)
class EDMWeight:
    """1 + snr: every level begins with the same loss. (sigma^2 + s^2) / (sigma s)^2 on images of standard deviation s.

    Karras et al. 2022, arXiv 2206.00364, table 1. On v it is the constant weight.
    """

    def __call__(self, snr: Tensor, slope2: Tensor) -> Tensor:
        """The weight of the output's error."""
        return (1 + snr) * slope2


WEIGHTS: dict[str, type] = {
    "constant": Constant, "min_snr": MinSNR, "soft_min_snr": SoftMinSNR, "p2": P2, "debiased": Debiased, "edm": EDMWeight,
}  # fmt: skip


def _above_zero(owner: str, name: str, value: float) -> None:
    if value <= 0:
        raise UsageError(f"{owner}: {name} is {value:g}; it takes a number above 0")
