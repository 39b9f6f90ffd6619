"""Dynamic thresholding: Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding, Saharia et al. 2022,
arXiv 2205.11487, section 2.3 and appendix A.1 ("Imagen")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate, Rule


@dataclass(frozen=True)
class Threshold:
    """Clip the guided x0 of each sample at the `percentile` s of its absolute values, and scale by bound / s, where s > bound.

    Works in x0; the noise follows. bound: what values should stay within, 1 for pixels of -1..1; latents of unit variance
    reach further (3 or 4 leaves most of them alone). Clipping the branches before guidance is another method: they do not
    commute.
    """

    percentile: float = 0.995
    bound: float = 1.0
    rule: Rule = field(default_factory=CFG)

    def __post_init__(self) -> None:
        if not (0 < self.percentile <= 1 and self.bound > 0):
            given = f"{self.percentile} and {self.bound}"
            raise UsageError(f"threshold: it takes a percentile above 0 to 1 and a bound above 0, got {given}")

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches."""
        return self.rule.needs(level)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The inner rule's estimate; samples that stay within the bound keep their x0 to the bit."""
        guided = self.rule(estimates, x, level)
        # Image by image: torch takes the quantile of 2^24 values at most.
        s = torch.stack([torch.quantile(x0.abs(), self.percentile) for x0 in guided.x0.flatten(1)])
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        s = s.clamp(min=self.bound)
        within = s <= self.bound
        if bool(within.all()):
            return guided
        clipped = guided.with_x0(lambda x0: x0.clamp(-s, s) * (self.bound / s), x, level)
        x0, noise = torch.where(within, guided.x0, clipped.x0), torch.where(within, guided.noise, clipped.noise)
        return Estimate(x0, noise, guided.log_var)
