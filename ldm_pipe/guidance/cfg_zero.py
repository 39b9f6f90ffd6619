"""CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models, Fan et al. 2025, arXiv 2503.18886, algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.prediction import FLOW
from ldm_pipe.samplewise import share


@dataclass(frozen=True)
class CFGZero:
    """Guidance s n + scale (p - s n) with the best s = <p, n> / <n, n> per sample, and no velocity at the first levels.

    Works in the flow v = noise - x0, whatever the network predicts. zero: at how many levels at the start of a run v is 0,
    which evaluates nothing there; the paper's best is about 4% of the steps. positive, negative: p and n.
    """

    scale: float = 5.0
    zero: int = 1
    positive: str = "cond"
    negative: str = "uncond"
    _seen: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def fresh(self) -> CFGZero:
        """The rule at the start of a run."""
        return replace(self)

    def needs(self, level: Level) -> tuple[str, ...]:
        """None while the velocity is 0, then both branches, or the positive one at scale 1."""
        if self._starting(level):
            return ()
        return (self.positive,) if self.scale == 1 else (self.positive, self.negative)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate; no velocity means x0 = noise = x / (alpha + sigma)."""
        starting = self._starting(level)
        if float(level.u) not in self._seen:
            self._seen.append(float(level.u))
        if starting:
            still = x / (level.alpha + level.sigma)
            return Estimate(still, still)
        p = estimates[self.positive]
        if self.scale == 1:
            return p
        there, other = (FLOW.target(e.x0, e.noise, level) for e in (p, estimates[self.negative]))
        other = share(there, other) * other
        out = there + (self.scale - 1) * (there - other)
        return Estimate(FLOW.x0(x, out, level), FLOW.noise(x, out, level), p.log_var)

    def _starting(self, level: Level) -> bool:
        u = float(level.u)
        return (self._seen.index(u) if u in self._seen else len(self._seen)) < self.zero
