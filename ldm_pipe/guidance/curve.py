"""Analysis of Classifier-Free Guidance Weight Schedulers, Wang et al. 2024, arXiv 2404.13040, section 4: a scale per level.

The paper's schedules run over the time; here they run over u = sigma / (alpha + sigma), so that one curve means the same on
every path and for every number of steps. The power of the cosine is that of Masked Diffusion Transformer (Gao et al. 2023,
arXiv 2303.14389).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate


@dataclass(frozen=True)
class Curve:
    """Classifier-free guidance whose scale goes from `low` at u = 1 (all noise) to `high` at u = 0 (clean).

    shape, with f = 1 - u: "linear" f, "cosine" (1 - cos(pi f^power)) / 2, "power" f^power, "parabola" 4 u (1 - u), which has
    `low` at both ends and `high` at u = 0.5. low may exceed high. Linear at each level, so the same in every space; where the
    scale is 1 one branch is evaluated.
    """

    low: float = 1.0
    high: float = 5.0
    shape: Literal["linear", "cosine", "power", "parabola"] = "linear"
    power: float = 1.0
    positive: str = "cond"
    negative: str = "uncond"

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UsageError(f"curve: power is {self.power}; it takes a number above 0")

    def scale(self, level: Level) -> float:
        """The scale at a level."""
        u = float(level.u)
        f = (1 - u) ** self.power
        part = {"linear": 1 - u, "power": f, "cosine": (1 - math.cos(math.pi * f)) / 2, "parabola": 4 * u * (1 - u)}[self.shape]
        return self.low + (self.high - self.low) * part

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches, or the positive one where the scale is 1."""
        return CFG(self.scale(level), self.positive, self.negative).needs(level)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """CFG at the level's scale."""
        return CFG(self.scale(level), self.positive, self.negative)(estimates, x, level)
