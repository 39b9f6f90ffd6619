"""Inversion: from a picture back to the x that a deterministic sampler makes it from.

DDIM inversion (Denoising Diffusion Implicit Models, Song et al. 2020, arXiv 2010.02502, section 4.3; Diffusion Models Beat
GANs, Dhariwal and Nichol 2021, arXiv 2105.05233, appendix F) reads the step backwards with the noise estimated at the less
noisy x, under the noisier level. Fixed-point corrections (AIDI, Pan et al. 2023, arXiv 2309.04907, eq. 8) estimate it again
at the x just found, until the step really comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Branches, CondAt, Denoiser, Rule, guided
from ldm_pipe.noise import NoNoise, Recorded
from ldm_pipe.walk import Sampler, Source, sample


@dataclass(frozen=True, eq=False)
class Inverse:
    """x: [B,C,H,W] at the first level of the walk. error: [B], the root mean square by which the walk from there misses the
    picture it was found for. levels: the walk. noise: what a sampler is to draw on it, None where it draws none. conds: by
    branch, the conditions under which the picture comes back, where they are not the usual ones."""

    x: Tensor
    error: Tensor
    levels: tuple[Level, ...] = ()
    noise: Recorded | None = None
    conds: Mapping[str, Cond | CondAt] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Remake:
    """How a picture is to be made again. branches: under the source prompt, B rows each. draws: noise, for what takes any."""

    branches: Branches
    rule: Rule
    levels: tuple[Level, ...]
    sampler: Sampler
    draws: Source

    @property
    def plain(self) -> Denoiser:
        """The estimate under the source prompt, without guidance."""
        return lambda x, level: self.branches(x, level, ("cond",))["cond"]

    @property
    def guided(self) -> Denoiser:
        """The estimate under the run's guidance."""
        return guided(self.branches, self.rule)

    def under(self, conds: Mapping[str, Cond | CondAt]) -> Remake:
        """The same with other conditions of some branches."""
        return replace(self, branches=replace(self.branches, conds={**self.branches.conds, **conds}))

    def inverse(
        self, picture: Tensor, x: Tensor, noise: Recorded | None = None, conds: Mapping[str, Cond | CondAt] | None = None
    ) -> Inverse:
        """An inversion's result, once it is known by how much the run misses the picture from there."""
        run = self.under(conds or {})
        back = sample(run.guided, x, self.levels, self.sampler, noise or NoNoise(x))
        return Inverse(x, _rms(back - picture), self.levels, noise, conds or {})


class Inversion(Protocol):
    """A registered inversion. sampler: the name and the fields of the one it takes where the user names none."""

    sampler: ClassVar[tuple[str, dict[str, Any]]]

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """Where the run is to start so that it makes the picture [B,C,H,W] under the source prompt."""


@dataclass(frozen=True)
class Plain:
    """DDIM inversion without guidance: cheap, and with guidance on the way down the picture comes back only nearly.

    corrections: more evaluations of every step, which take away its own error but not that of the guidance.
    """

    sampler: ClassVar[tuple[str, dict[str, Any]]] = ("ddim", {})

    corrections: int = 0

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """One evaluation of every step, and the run itself."""
        return run.inverse(picture, ascend(run.plain, picture, run.levels, run.sampler, self.corrections)[0])


@dataclass(frozen=True)
class FixedPoint:
    """Inversion of the guided step itself, its estimate corrected until the step comes back (AIDI).

    corrections: more evaluations of every step. Where strong guidance keeps them from converging the reported error says so.
    """

    sampler: ClassVar[tuple[str, dict[str, Any]]] = ("ddim", {})

    corrections: int = 5

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """1 + corrections guided evaluations of every step, and the run itself."""
        return run.inverse(picture, ascend(run.guided, picture, run.levels, run.sampler, self.corrections)[0])


def invert(denoise: Denoiser, picture: Tensor, levels: Sequence[Level], sampler: Sampler, corrections: int = 0) -> Inverse:
    """The x at levels[0] from which `sampler` makes `picture` [B,C,H,W] along the falling levels, with one evaluation of every
    step and `corrections` more, and the walk itself once to tell the error.

    Any deterministic sampler without memory: Euler, DDIM at eta 0, Heun. Raises UsageError for one that keeps a memory (a
    multistep method read backwards is no inverse), draws noise, or for levels that rise.
    """
    x = ascend(denoise, picture, levels, sampler, corrections)[0]
    back = sample(denoise, x, levels, sampler, NoNoise(x))
    return Inverse(x, _rms(back - picture), tuple(levels))


def ascend(denoise: Denoiser, picture: Tensor, levels: Sequence[Level], sampler: Sampler, corrections: int = 0) -> list[Tensor]:
    """`invert`'s x at every level of the walk, the noisiest first and the picture last."""
    if any(float(b.u) > float(a.u) for a, b in pairwise(levels)):
        raise UsageError("inversion takes the falling levels of the walk, not their reverse")
    if corrections < 0:
        raise UsageError(f"corrections is {corrections}; it takes a whole number from 0")
    trail = [picture]
    with torch.no_grad():
        for here, there in reversed(list(pairwise(levels))):
            x = target = trail[0]
            for _ in range(corrections + 1):
                x = x + _gain(here, there) * (target - single_step(denoise, x, here, there, sampler))
            trail.insert(0, x)
    return trail


def _rms(gap: Tensor) -> Tensor:
    return gap.square().flatten(1).mean(1).sqrt()


def _gain(here: Level, there: Level) -> float:
    """What x is multiplied by on the way up while the noise stands still; at alpha = 0, while x0 does."""
    if here.alpha > 0:
        return float(here.alpha / there.alpha)
    if there.sigma == 0:
        raise UsageError("one step from pure noise to a picture has no inverse; use more steps")
    return float(here.sigma / there.sigma)


def single_step(denoise: Denoiser, x: Tensor, here: Level, there: Level, sampler: Sampler) -> Tensor:
    """A step of a sampler that needs no more than x. Raises UsageError where it draws noise or keeps a memory."""

    def drawn(tag: str = "step") -> Tensor:
        raise UsageError(f"{type(sampler).__name__} draws noise; inversion takes a deterministic one, such as ddim at eta 0")

    done = sampler.step(denoise, x, here, there, None, drawn)
    if done.memory is not None:
        raise UsageError(f"{type(sampler).__name__} keeps a memory; inversion takes a sampler of single steps, such as ddim")
    return done.x
