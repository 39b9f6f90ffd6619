"""CFG rescale: Common Diffusion Noise Schedules and Sample Steps are Flawed, Lin et al. 2023, arXiv 2305.08891, eq. 15-16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate, Rule
from ldm_pipe.prediction import CLEAN_IMAGE, EPS, VELOCITY, Prediction

SPACES: dict[str, Prediction] = {"x0": CLEAN_IMAGE, "eps": EPS, "v": VELOCITY}


@dataclass(frozen=True)
class Rescale:
    """Give the guided output the standard deviation of the positive branch's, by the part phi (0: no change).

    The deviation is over C, H, W of each sample. It is not linear, so the space matters: in x0 the factor is far smaller
    than in eps. `space` "v" is the paper's (its network predicts v); diffusers takes whatever the network predicts.
    """

    phi: float = 0.7
    rule: Rule = field(default_factory=CFG)
    space: Literal["x0", "eps", "v"] = "v"
    positive: str = "cond"

    def __post_init__(self) -> None:
        """Raise UsageError outside 0..1."""
        if not 0 <= self.phi <= 1:
            raise UsageError(f"rescale: phi is {self.phi}; it takes a number from 0 to 1")

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches, and the positive one."""
        return tuple(dict.fromkeys((*self.rule.needs(level), self.positive)))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """phi 0 returns the inner rule's estimate itself."""
        guided = self.rule(estimates, x, level)
        if self.phi == 0:
            return guided
        space = SPACES[self.space]
        out = space.target(guided.x0, guided.noise, level)
        plain = space.target(estimates[self.positive].x0, estimates[self.positive].noise, level)
        factor = self.phi * _deviation(plain) / _deviation(out) + 1 - self.phi
        return Estimate(space.x0(x, out * factor, level), space.noise(x, out * factor, level), guided.log_var)


def _deviation(t: Tensor) -> Tensor:
    return torch.std(t, dim=tuple(range(1, t.ndim)), keepdim=True)
