"""Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models, Castillo et al. 2023, arXiv 2312.12487.

Section 4: once the noise estimates of both branches point the same way, the negative one is no longer asked. At high noise they
do so as well, whatever the prompt: without a guard the rule stops guiding at the first step, so decisions wait for a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate, Rule
from ldm_pipe.samplewise import cosine


@dataclass(frozen=True)
class Adaptive:
    """The rule until the noises of the two branches have a cosine of `threshold`, then the positive branch alone, per sample.

    Works in the noise, whatever the network predicts. threshold: above 1 is the rule itself. guard: decides only where
    u < guard, which by default is about half of the steps; 1 is no guard. The step that decides is still guided; after it the
    other branches are not evaluated for that sample, and the sub-batch shrinks. Where the noise rises above the level of the
    decision, guidance is on again.
    """

    threshold: float = 0.991
    guard: float = 0.6
    rule: Rule = field(default_factory=CFG)
    positive: str = "cond"
    negative: str = "uncond"
    _until: list[float] = field(default_factory=list, init=False, repr=False, compare=False)  # u of each sample's decision

    def __post_init__(self) -> None:
        if not 0 <= self.guard <= 1:
            raise UsageError(f"adaptive: guard is {self.guard}; it takes a number from 0 to 1 = no guard")

    def fresh(self) -> Adaptive:
        """The rule with nothing decided."""
        return replace(self)

    def needs(self, level: Level) -> tuple[str, ...]:
        """The inner rule's branches while a sample is guided, then the positive one."""
        if self._until and not self._guided(level):
            return (self.positive,)
        return tuple(dict.fromkeys((*self.rule.needs(level), self.positive)))

    def rows(self, level: Level) -> dict[str, list[int]]:
        """The samples for which branches other than the positive one are needed."""
        guided = self._guided(level)
        return {n: guided for n in self.needs(level) if n != self.positive} if self._until else {}

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The inner rule's estimate for the samples that are still guided."""
        if not self._until:
            self._until.extend([-1.0] * len(x))
        p, guided = estimates[self.positive], self._guided(level)
        if not guided:
            return p
        found = self.rule(estimates, x, level)
        if self.negative in estimates:
            self._decide(cosine(p.noise, estimates[self.negative].noise).flatten().tolist(), guided, float(level.u))
        if len(guided) == len(x):
            return found
        mask = torch.zeros(len(x), *[1] * (x.ndim - 1), dtype=torch.bool, device=x.device)
        mask[guided] = True
        return Estimate(torch.where(mask, found.x0, p.x0), torch.where(mask, found.noise, p.noise), p.log_var)

    def _guided(self, level: Level) -> list[int]:
        return [k for k, until in enumerate(self._until) if float(level.u) > until]

    def _decide(self, cosines: list[float], guided: list[int], u: float) -> None:
        if u < self.guard or self.guard == 1:
            for k in guided:
                self._until[k] = u if cosines[k] >= self.threshold else -1.0
