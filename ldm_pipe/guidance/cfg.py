"""Classifier-Free Diffusion Guidance, Ho and Salimans 2022, arXiv 2207.12598."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Estimate


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance p + (scale - 1) (p - n): the positive branch p moved away from the negative one n.

    scale: 1 is p itself and evaluates one branch; the paper's w is scale - 1. positive, negative: names of the branches;
    "uncond" holds the empty or the negative prompt. Linear, so the same in x0, noise and v.
    """

    scale: float = 5.0
    positive: str = "cond"
    negative: str = "uncond"

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches, or the positive one at scale 1."""
        return (self.positive,) if self.scale == 1 else (self.positive, self.negative)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The extrapolated estimate; a learned variance is the positive branch's."""
        p = estimates[self.positive]
        if self.scale == 1:
            return p
        n, more = estimates[self.negative], self.scale - 1
        return Estimate(p.x0 + more * (p.x0 - n.x0), p.noise + more * (p.noise - n.noise), p.log_var)
