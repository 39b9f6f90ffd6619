"""Applying Guidance in a Limited Interval Improves Sample and Distribution Quality, Kynkaanniemi et al. 2024, 2404.07724."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ldm_pipe.errors import check_interval
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level, inside
from ldm_pipe.model import Estimate, Rule


@dataclass(frozen=True)
class Between:
    """The rule while the noise u, which falls from 1 to 0 over a run, is in lo <= u < hi; no guidance and no cost elsewhere.

    lo, hi: in u = sigma / (alpha + sigma), 0..1 with 1 = all noise; the interval is half-open, but hi = 1 includes u = 1.
    """

    lo: float
    hi: float
    rule: Rule = field(default_factory=CFG)
    positive: str = "cond"

    def __post_init__(self) -> None:
        check_interval("between", self.lo, self.hi)

    def inside(self, level: Level) -> bool:
        """Does the rule apply at this level?"""
        return inside(level, self.lo, self.hi)

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches inside the interval, else the positive one."""
        return self.rule.needs(level) if self.inside(level) else (self.positive,)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The inner rule's estimate inside the interval, else the positive branch's."""
        return self.rule(estimates, x, level) if self.inside(level) else estimates[self.positive]
