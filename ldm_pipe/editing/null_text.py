"""Null-text Inversion for Editing Real Images using Guided Diffusion Models, Mokady et al. 2022, arXiv 2211.09794, algorithm 1.

The pivot is the trail of an inversion without guidance. Then, step by step under the run's guidance, the tokens of the other
branch are optimised until the step lands on the pivot. (Its eq. 3 has the pivot's z*, which slides print as the moving z.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.editing.invert import Inverse, Remake, ascend, single_step
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate


@dataclass(frozen=True, eq=False)
class PerLevel:
    """A Cond for each level of a walk."""

    conds: Mapping[Level, Cond]

    def __call__(self, level: Level) -> Cond:
        """That of the level. Raises UsageError at others."""
        if level not in self.conds:
            raise UsageError("null-text conditions hold at the levels they were found for; use a sampler of single evaluations")
        return self.conds[level]


@dataclass(frozen=True)
class NullText:
    """Inversion without guidance; then the empty prompt's tokens are optimised, step by step, to bring it back.

    inner: Adam steps at most, for every step. rate: theirs, falling to its half over the walk. tolerance: the mean square at
    which they stop, growing to its 101-fold over the walk (0: never). corrections: more evaluations of every inverted step.
    """

    sampler: ClassVar[tuple[str, dict[str, Any]]] = ("ddim", {})

    inner: int = 10
    rate: float = 1e-2
    tolerance: float = 1e-5
    corrections: int = 0

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """Raises UsageError for a sampler of several evaluations a step, and where the guidance has no branch "uncond"."""
        if run.sampler.calls != 1:
            raise UsageError(f"{type(run.sampler).__name__} evaluates a step {run.sampler.calls} times; null_text takes ddim")
        trail = ascend(run.plain, picture, run.levels, run.sampler, self.corrections)
        conds, x = dict[Level, Cond](), trail[0]
        null = run.branches.conds["uncond"]
        for k, (here, there) in enumerate(pairwise(run.levels)):
            part = k / (len(run.levels) - 1)  # the paper's 50 steps have lr 1e-2 (1 - k / 100), stop at 1e-5 + 2e-5 k
            null, x = self._fitted(run, null if isinstance(null, Cond) else null(here), x, trail[k + 1], (here, there, part))
            conds[here] = null
        return run.inverse(picture, trail[0], conds={"uncond": PerLevel(conds)})

    def _fitted(self, run: Remake, null: Cond, x: Tensor, pivot: Tensor, at: tuple[Level, Level, float]) -> tuple[Cond, Tensor]:
        """The tokens with which a step from x comes nearest to the pivot, started from the last step's; and where it lands."""
        here, there, part = at
        needed = run.rule.needs(here)
        with torch.no_grad():
            fixed = run.branches(x, here, [n for n in needed if n != "uncond"])
        if "uncond" not in needed or null.tokens is None:
            with torch.no_grad():
                return null, single_step(_known(run.rule(fixed, x, here)), x, here, there, run.sampler)
        kind = null.tokens.dtype
        tokens = null.tokens.to(torch.promote_types(kind, torch.float32), copy=True).requires_grad_()

        def landed() -> Tensor:
            free = run.under({"uncond": replace(null, tokens=tokens.to(kind))}).branches(x, here, ("uncond",))
            return single_step(_known(run.rule({**fixed, **free}, x, here)), x, here, there, run.sampler)

        adam = torch.optim.Adam([tokens], lr=self.rate * (1 - part / 2))
        with torch.enable_grad():
            for _ in range(self.inner):
                loss = (landed() - pivot).square().flatten(1).mean(1)
                if float(loss.detach().max()) < self.tolerance * (1 + 100 * part):
                    break
                (tokens.grad,) = torch.autograd.grad(loss.sum(), tokens)
                adam.step()
        with torch.no_grad():
            return replace(null, tokens=tokens.detach().to(kind)), landed()


def _known(estimate: Estimate) -> Denoiser:
    return lambda x, level: estimate
