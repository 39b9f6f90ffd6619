"""TCFG: Tangential Damping Classifier-free Guidance, Kwon et al. 2025, arXiv 2503.18137, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.prediction import EPS
from ldm_pipe.samplewise import dot


@dataclass(frozen=True)
class TCFG:
    """CFG after the negative branch is projected onto the main direction of both, per sample: what lies across is damped.

    The main direction is the first right singular vector of the two scores as rows. Works in the noise (the score up to its
    scale). At alpha = 0 both branches hold one noise, there is nothing to damp, and it is CFG.
    """

    scale: float = 5.0
    positive: str = "cond"
    negative: str = "uncond"

    @property
    def plain(self) -> CFG:
        """What it is where there is nothing to damp."""
        return CFG(self.scale, self.positive, self.negative)

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches, or the positive one at scale 1."""
        return self.plain.needs(level)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        if self.scale != 1 and level.alpha != 0 and level.sigma != 0:
            noise = damped(estimates[self.positive].noise, estimates[self.negative].noise)
            estimates = {**estimates, self.negative: Estimate(EPS.x0(x, noise, level), noise)}
        return self.plain(estimates, x, level)


def damped(p: Tensor, n: Tensor) -> Tensor:
    """n projected onto the first right singular vector of the rows p, n, for every sample: [B,...].

    Of the 2x2 Gram matrix the first eigenvector w gives that vector as (w0 p + w1 n) / its norm. In float64: the rows are
    nearly parallel.
    """
    a, b = p.double(), n.double()
    aa, ab, bb = (dot(*pair).flatten() for pair in ((a, a), (a, b), (b, b)))
    gram = torch.stack([torch.stack([aa, ab], 1), torch.stack([ab, bb], 1)], 1)
    first = torch.linalg.eigh(gram)[1][:, :, 1].reshape(-1, 2, *[1] * (p.ndim - 1))
    main = first[:, 0] * a + first[:, 1] * b
    square = dot(main, main)
    return torch.where(square > 0, dot(main, b) / square.where(square > 0, 1.0) * main, b).to(n)
