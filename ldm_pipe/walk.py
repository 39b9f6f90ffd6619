"""Walking down the levels: the Sampler, one Step, `trajectory` and `sample`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise


class Step(NamedTuple):
    """One step done: x at the level `there`, the estimate it came from (of the level left), the sampler's memory."""

    x: Tensor
    estimate: Estimate
    memory: Any = None
    here: Level = Level(0.0, 1.0)
    there: Level = Level(0.0, 1.0)
    number: int = 0


class Source(Protocol):
    """Where a walk's noise comes from: `Noise`, or anything with `at`."""

    def at(self, index: int) -> StepNoise:
        """The draws of walk index `index`, by tag."""


class Sampler:
    """Base of the samplers: frozen dataclasses with a `step`, no hidden state.

    `travels` says that a rise in the levels is meant (RePaint); memory restarts there. `calls` is how many evaluations one
    full step takes, 0 where a tolerance decides.
    """

    travels: ClassVar[bool] = False
    calls: ClassVar[int] = 1

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """x at the first level, from standard normal noise [B,C,H,W]: unit variance data is assumed, so that a VP walk
        starts from noise of scale 1 (as DDIM does) whether or not its table reaches alpha = 0."""
        return noise * float(level.alpha**2 + level.sigma**2) ** 0.5

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """From x at `here` to x at `there`. `memory` is what the last step returned, None at first."""
        raise TypeError(f"{type(self).__name__} has no step")

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """The levels to walk, given falling ones: a sampler that travels adds its rises, a truncated one leaves some out."""
        return list(levels)


class Wrapping(Sampler):
    """Base of the samplers that act around another one, their field `sampler`: where it starts, what it costs, whether it
    travels and what it remembers follow from that one. Subclasses say in `down` what they add to its steps.
    """

    sampler: Sampler

    @property
    def travels(self) -> bool:  # type: ignore[override]
        """Does the wrapped sampler?"""
        return self.sampler.travels

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Those of the wrapped sampler: what it adds costs no evaluation."""
        return self.sampler.calls

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The wrapped sampler's."""
        return self.sampler.start(noise, level)

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """The wrapped sampler's."""
        return self.sampler.walk(levels)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Down: `down`. Up: more noise, and x as its own estimate; no network is asked."""
        if float(there.u) > float(here.u):
            return Step(climb(x, here, there, noise("climb")), Estimate(x / here.alpha, noise("climb")))
        return self.down(denoise, x, here, there, memory, noise)

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """A step to less noise: the wrapped sampler's."""
        return self.sampler.step(denoise, x, here, there, memory, noise)


def climb(x: Tensor, here: Level, there: Level, noise: Tensor) -> Tensor:
    """A draw of x at a level of more noise given x at one of less: q(x_t | x_s) = N(r x_s, sigma_t^2 - r^2 sigma_s^2)."""
    r = there.alpha / here.alpha
    return r * x + max(there.sigma**2 - (r * here.sigma) ** 2, 0.0) ** 0.5 * noise


def trajectory(denoise: Denoiser, x: Tensor, levels: Sequence[Level], sampler: Sampler, noise: Source) -> Iterator[Step]:
    """Yield a Step after every step; previews, progress, logging and stopping early belong to the caller.

    x: [B,C,H,W] at levels[0] (from `sampler.start`, or a mixed image for editing). Raises UsageError where the levels rise
    under a sampler that does not travel, or a level is left at sigma = 0.
    """
    if len(levels) < 2:
        raise UsageError("a walk needs at least two levels")
    memory = None
    for index, (here, there) in enumerate(pairwise(levels)):
        rises = float(there.u) > float(here.u)
        if rises and not sampler.travels:
            raise UsageError(f"{type(sampler).__name__} does not travel: level {index + 1} has more noise than level {index}")
        if here.sigma == 0 and not rises:
            raise UsageError(f"level {index} is clean already (sigma = 0); nothing can be denoised from it")
        # Set around the step, not around the generator: a `with` that spans a yield would leak into the caller.
        with torch.no_grad():
            done = sampler.step(denoise, x, here, there, None if rises else memory, noise.at(index))
        x, memory = done.x, done.memory
        yield done._replace(here=here, there=there, number=index)


def sample(denoise: Denoiser, x: Tensor, levels: Sequence[Level], sampler: Sampler, noise: Source) -> Tensor:
    """The end of a trajectory: x at the last level."""
    for done in trajectory(denoise, x, levels, sampler, noise):
        x = done.x
    return x
