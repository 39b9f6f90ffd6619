"""Autoguidance: Guiding a Diffusion Model with a Bad Version of Itself, Karras et al. 2024, arXiv 2406.02507, section 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, Denoiser, Estimate, Model


@dataclass(frozen=True)
class Autoguidance:
    """Guidance p + (scale - 1) (p - w), where w is a weaker model's estimate under the same condition.

    weak: the model, or its folder: an earlier checkpoint, a smaller network; its conditions are those of the main model's text
    encoder, and x lies on any path. "" where the run has a branch of that name already. Linear, so the same in every space.
    """

    scale: float = 2.0
    weak: str | Model = ""
    positive: str = "cond"
    branch: str = "weak"

    def opened(self, load: Callable[[str], Model]) -> Autoguidance:
        """The rule with its model loaded from the folder."""
        return replace(self, weak=load(self.weak)) if isinstance(self.weak, str) and self.weak else self

    def others(self, branches: Branches) -> dict[str, Denoiser]:
        """The weak model under the positive condition."""
        if isinstance(self.weak, str) or self.scale == 1:
            return {}
        return {self.branch: self.weak.bind(branches.cond(self.positive), self.branch)}

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both, or the positive branch at scale 1."""
        return CFG(self.scale, self.positive, self.branch).needs(level)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """CFG with the weak branch as the negative one."""
        return CFG(self.scale, self.positive, self.branch)(estimates, x, level)
