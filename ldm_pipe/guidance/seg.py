"""Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy Curvature of Attention, Hong 2024, arXiv 2408.00760.

Blurring the queries over the image blurs the attention weights (section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ldm_pipe.attention import Site, grid
from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.model import Branches, Denoiser, Rule
from ldm_pipe.perturb import Perturbed, attending, blurred


@dataclass(frozen=True)
class SEG(Perturbed):
    """The rule, plus scale (p - p'), where p' comes from self-attention with queries blurred by a Gaussian.

    blur: its deviation in positions; None, as in the paper's best runs, gives every position the mean of the queries. At the
    border the kernel is cut and normalised. layers: parts of the names of self-attentions, commas between; "" the innermost.
    Alone (`seg(3)`) it guides without a negative branch. One evaluation more. Linear, so the same in every space.
    """

    scale: float = 3.0
    blur: float | None = None
    layers: str = ""
    rule: Rule = field(default_factory=lambda: CFG(1.0))
    positive: str = "cond"
    branch: str = "seg"

    def __post_init__(self) -> None:
        if self.blur is not None and not self.blur > 0:
            raise UsageError(f"seg: blur is {self.blur}; it takes a number above 0, or None for the mean")

    def worse(self, branches: Branches) -> Denoiser:
        """The model with blurred queries."""
        return attending(branches, self.positive, self.branch, self.layers, lambda x: _Blur(x, self.blur))


@dataclass(frozen=True, eq=False)
class _Blur:
    """The queries [B,heads,L,D] as maps of x's proportions, blurred."""

    x: Tensor
    deviation: float | None

    def inputs(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if site.cross:
            return q, k, v
        maps = q.mT.reshape(*q.mT.shape[:3], *grid(q.shape[2], *self.x.shape[2:]))
        return blurred(maps, self.deviation).flatten(-2).mT, k, v
