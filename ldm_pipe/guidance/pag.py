"""Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, Ahn et al. 2024, arXiv 2403.17377, section 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ldm_pipe.attention import Site
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Rule
from ldm_pipe.perturb import attending, pushed


@dataclass(frozen=True)
class PAG:
    """The rule, plus scale (p - p'), where p' comes from self-attention whose map is the identity: each position sees itself.

    layers: parts of the names of self-attentions, commas between; "" the innermost. Alone (`pag(3)`) it guides without a
    negative branch. One evaluation more. Linear, so the same in every space.
    """

    scale: float = 3.0
    layers: str = ""
    rule: Rule = field(default_factory=lambda: CFG(1.0))
    positive: str = "cond"
    branch: str = "pag"

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The perturbed model under the positive condition."""
        return {} if self.scale == 0 else {self.branch: attending(branches, self.positive, self.branch, self.layers, _rule)}

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches, the positive and the perturbed one; the inner rule's alone at scale 0."""
        added = () if self.scale == 0 else (self.positive, self.branch)
        return tuple(dict.fromkeys((*self.rule.needs(level), *added)))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        guided = self.rule(estimates, x, level)
        if self.scale == 0:
            return guided
        return pushed(guided, estimates[self.positive], estimates[self.branch], self.scale)


def _rule(x: Tensor) -> _Identity:
    return _Identity()


class _Identity:
    """Every position attends to itself alone."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        return out if site.cross else v
