"""Noise-damped guidance: ScaleCrafter, He et al. 2023, arXiv 2310.07702, section 3.4: two versions of a network on one walk.

A network that was changed to draw larger images keeps their structure but removes noise less well. So the direction comes from
the changed network and the base from a milder one. That is three branches; the milder network's positive one is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Model


@dataclass(frozen=True)
class NoiseDamped:
    """Guidance base + scale (p - n), where p and n are of the changed network and `base` is the milder one's without a prompt.

    mild: the milder model; None where the run has a branch named `base` already. Where both are one model it is CFG. Linear, so
    the same in every space.
    """

    scale: float = 5.0
    mild: Model | None = None
    base: str = "base"
    positive: str = "cond"
    negative: str = "uncond"

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The milder model under the negative condition."""
        return {} if self.mild is None else {self.base: self.mild.bind(branches.cond(self.negative), self.base)}

    def needs(self, level: Level) -> tuple[str, ...]:
        """All three."""
        return (self.positive, self.negative, self.base)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        p, n, base = (estimates[name] for name in self.needs(level))
        x0, noise = base.x0 + self.scale * (p.x0 - n.x0), base.noise + self.scale * (p.noise - n.noise)
        return Estimate(x0, noise, p.log_var)
