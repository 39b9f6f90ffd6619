"""Perp-Neg: Re-imagine the Negative Prompt Algorithm, Armandpour et al. 2023, arXiv 2304.04968, section 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.samplewise import share


@dataclass(frozen=True)
class PerpNeg:
    """Guidance u + scale (d - sum of weight_i * (d_i across d)), where d = p - u and d_i = n_i - u.

    Of every negative prompt only what is across the positive one is taken away, so that what both share stays. empty: the
    branch u of no prompt; negatives: names of branches, such as "text:a cat"; weights: one each, or one for all. The split is
    the same in x0 and in the noise, where all differences are scaled alike.
    """

    scale: float = 5.0
    negatives: tuple[str, ...] = ("negative",)
    weights: tuple[float, ...] = (1.0,)
    positive: str = "cond"
    empty: str = "uncond"

    def __post_init__(self) -> None:
        if len(self.weights) not in (1, len(self.negatives)):
            raise UsageError(
                f"perp_neg: {len(self.weights)} weights for {len(self.negatives)} negatives; give one, or one each"
            )

    def needs(self, level: Level) -> tuple[str, ...]:
        """All branches."""
        return (self.positive, self.empty, *self.negatives)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        p, u = estimates[self.positive], estimates[self.empty]
        x0, noise = p.x0 - u.x0, p.noise - u.noise
        weights = self.weights if len(self.weights) == len(self.negatives) else self.weights * len(self.negatives)
        dx0, dnoise = x0, noise
        for name, weight in zip(self.negatives, weights, strict=True):
            n = estimates[name]
            along = share(n.x0 - u.x0, x0)
            dx0 = dx0 - weight * (n.x0 - u.x0 - along * x0)
            dnoise = dnoise - weight * (n.noise - u.noise - along * noise)
        return Estimate(u.x0 + self.scale * dx0, u.noise + self.scale * dnoise, p.log_var)
