"""CFG++: Manifold-constrained Classifier Free Guidance for Diffusion Models, Chung et al. 2024, arXiv 2406.08070, section 3.

Only what is renoised differs from CFG: x goes on from the guided x0 with the noise of the unconditional branch. An Estimate
holds both, so this is a rule, and DDIM under it is the paper's update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Estimate


@dataclass(frozen=True)
class CFGPP:
    """Guidance between the branches, x0 = n + scale (p - n), renoised with the noise of n.

    scale: the paper's lambda, 0..1, far below the scales of CFG. For samplers that renoise with the estimate's noise: ddim,
    euler, euler_ancestral, renoise; those that read x0 alone see plain guidance at `scale`. Linear, so the same in every space.
    """

    scale: float = 0.6
    positive: str = "cond"
    negative: str = "uncond"

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches at every scale: the noise is the negative one's."""
        return (self.positive, self.negative)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """x0 between the branches; the noise of the negative one."""
        p, n = estimates[self.positive], estimates[self.negative]
        return Estimate(n.x0 + self.scale * (p.x0 - n.x0), n.noise, p.log_var)
