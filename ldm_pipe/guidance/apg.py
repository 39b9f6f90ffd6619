"""APG: Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models, Sadat et al. 2024, 2410.02416.

Section 4: the difference of the branches is split into a part along the positive estimate, which saturates, and a part across
it, which improves; its norm is bounded, and a momentum over the steps pushes away from where the last ones went (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.samplewise import norm, share


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance: p + (scale - 1) (across + along * (the part of the difference along p)).

    Works in x0, the noise follows; every norm and product is of one sample. along: the paper's eta, 1 keeps all of the
    difference. bound: the largest norm of the difference (the paper's r), 0 for none; norms grow with the root of the
    number of values. momentum: the paper's beta, below 0. With along 1, bound 0 and momentum 0 it is CFG.
    """

    scale: float = 5.0
    along: float = 0.0
    bound: float = 0.0
    momentum: float = -0.5
    positive: str = "cond"
    negative: str = "uncond"
    _last: list[tuple[float, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bound < 0 or abs(self.momentum) >= 1:
            given = f"{self.bound} and {self.momentum}"
            raise UsageError(f"apg: it takes a bound of 0 or more and a momentum above -1 and below 1, got {given}")

    def fresh(self) -> APG:
        """The rule without a running difference."""
        return replace(self)

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches, or the positive one at scale 1."""
        return (self.positive,) if self.scale == 1 else (self.positive, self.negative)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate; the running difference starts anew where the noise rises again."""
        p = estimates[self.positive]
        if self.scale == 1:
            return p
        difference, u = p.x0 - estimates[self.negative].x0, float(level.u)
        if self.momentum and self._last and u <= self._last[0][0]:
            difference = difference + self.momentum * self._last[0][1]
        self._last[:] = [(u, difference)]
        if self.bound:
            size = norm(difference)
            difference = difference * torch.where(size > self.bound, self.bound / size, 1.0)
        inside = share(difference, p.x0) * p.x0
        update = difference - inside + self.along * inside
        return p.with_x0(lambda x0: x0 + (self.scale - 1) * update, x, level)
