"""Improving Sample Quality of Diffusion Models Using Self-Attention Guidance, Hong et al. 2022, 2210.00939, algorithm 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.attention import Site, grid
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Rule
from ldm_pipe.perturb import attending, blurred
from ldm_pipe.prediction import EPS


@dataclass(frozen=True)
class SAG:
    """The rule, plus scale (e - e'), where e' is the noise of an x whose x0 was blurred where self-attention looks.

    Works in the noise, whatever the network predicts. source: the branch whose x0 is blurred; with a negative branch the paper
    takes that one. blur: the Gaussian's deviation in latent pixels. looked: how often a position must be attended to, in units
    of the mean. layers: parts of the names of self-attentions, of which the first is read; "" the innermost. One evaluation
    more. At alpha = 0 there is nothing to blur, and it is the inner rule.
    """

    scale: float = 0.75
    blur: float = 1.0
    looked: float = 1.0
    layers: str = ""
    rule: Rule = field(default_factory=lambda: CFG(1.0))
    source: str = "uncond"
    branch: str = "sag"

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The source, whose attention is read on the way, and the model on the blurred x."""
        if self.scale == 0:
            return {}
        seen: dict[str, Estimate] = {}
        maps = _Maps([])
        watched = attending(branches, self.source, self.source, self.layers, lambda x: maps)
        again = branches.own(self.source, self.branch)

        def source(x: Tensor, level: Level) -> Estimate:
            maps.found.clear()
            seen["source"] = watched(x, level)
            return seen["source"]

        def degraded(x: Tensor, level: Level) -> Estimate:
            x0, noise = seen["source"][:2]
            there = _upscaled(maps.found[0] > self.looked, x)
            return again(level.mix(there * blurred(x0, self.blur) + (1 - there) * x0, noise), level)

        return {self.source: source, self.branch: degraded}

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches, then the source and the degraded one, in this order."""
        added = () if self._idle(level) else (self.source, self.branch)
        return tuple(dict.fromkeys((*self.rule.needs(level), *added)))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate."""
        guided = self.rule(estimates, x, level)
        if self._idle(level):
            return guided
        noise = guided.noise + self.scale * (estimates[self.source].noise - estimates[self.branch].noise)
        return Estimate(EPS.x0(x, noise, level), noise, guided.log_var)

    def _idle(self, level: Level) -> bool:
        return self.scale == 0 or float(level.alpha) == 0


@dataclass(frozen=True)
class _Maps:
    """Notes how much each position is attended to, [B,L] with mean 1, and changes nothing."""

    found: list[Tensor]

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if not site.cross:
            self.found.append(site.maps(q, k, slice(None)).mean(1).sum(1))
        return out


def _upscaled(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of positions [B,L] as one of x's pixels, [B,1,H,W]."""
    return F.interpolate(mask.to(x).reshape(len(x), 1, *grid(mask.shape[1], *x.shape[2:])), x.shape[2:])
