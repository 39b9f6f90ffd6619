"""Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance, Ahn et al. 2024, arXiv 2403.17377, section 4."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ldm_pipe.attention import Site
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.model import Branches, Denoiser, Rule
from ldm_pipe.perturb import Perturbed, attending


@dataclass(frozen=True)
class PAG(Perturbed):
    """The rule, plus scale (p - p'), where p' comes from self-attention whose map is the identity: each position sees itself.

    layers: parts of the names of self-attentions, commas between; "" the innermost. Alone (`pag(3)`) it guides without a
    negative branch. One evaluation more. Linear, so the same in every space.
    """

    scale: float = 3.0
    layers: str = ""
    rule: Rule = field(default_factory=lambda: CFG(1.0))
    positive: str = "cond"
    branch: str = "pag"

    def worse(self, branches: Branches) -> Denoiser:
        """The model whose self-attention is the identity."""
        return attending(branches, self.positive, self.branch, self.layers, lambda x: _Identity())


class _Identity:
    """Every position attends to itself alone."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        return out if site.cross else v
