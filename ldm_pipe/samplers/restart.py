"""Restart Sampling for Improving Generative Processes, Xu et al. 2023, arXiv 2306.14878, algorithm 1.

Between two noise levels the walk goes up and down again: a large dose of noise at once, whose contraction removes what the
discretised ODE had collected as errors, and then the ODE once more. The rises are levels of the walk, each a draw from
q(x_t | x_s); the falls are Heun's steps of Karras et al. 2022, arXiv 2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step, climb


@dataclass(frozen=True)
class Restart(Sampler):
    """Heun's method that goes back up between two noise levels, several times; two evaluations a step down.

    The steps out of alpha = 0 and into sigma = 0 are Euler's. More evaluations than `steps` says: `times` * 2 * `inner` more.

    times: how often it goes back up; 0 is Heun's. low, high: where, in sigma / alpha (the paper's t_min and t_max; that of
    the walk nearest to low is taken). inner: steps of each descent. rho: of their Karras spacing.
    """

    times: int = 2
    low: float = 0.1
    high: float = 2.0
    inner: int = 4
    rho: float = 7.0
    calls: ClassVar[int] = 2
    travels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (0 <= self.times <= 1000 and 1 <= self.inner <= 1000):
            raise UsageError(f"restart: times takes 0 to 1000 and inner 1 to 1000, got {self.times} and {self.inner}")
        if not (0 < self.low < self.high < math.inf and self.rho > 0):
            raise UsageError(f"restart needs 0 < low < high and rho > 0, got {self.low:g}, {self.high:g}, {self.rho:g}")

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """The levels with the descents after the one nearest to `low`; as they are where none lies between low / 2 and high."""
        near = {k: lv.ratio for k, lv in enumerate(levels) if 0 < lv.ratio < self.high}
        gaps = {k: abs(math.log(ratio / self.low)) for k, ratio in near.items()}
        place = min(gaps, key=gaps.__getitem__, default=None)
        if self.times == 0 or place is None or levels[place].ratio < self.low / 2:
            return list(levels)
        back = [*self._descent(levels[place].ratio), levels[place]] * self.times
        return [*levels[: place + 1], *back, *levels[place + 1 :]]

    def _descent(self, low: float) -> list[Level]:
        """Levels on the circle from `high` on, the last one above `low`."""
        first, last = self.high ** (1 / self.rho), low ** (1 / self.rho)
        ratios = [(first + (last - first) * k / self.inner) ** self.rho for k in range(self.inner)]
        return [Level(1 / math.hypot(1, r), r / math.hypot(1, r)) for r in ratios]

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Up: noise, and no evaluation. Down: two, or one at an end point."""
        if float(there.u) > float(here.u):
            return Step(climb(x, here, there, noise("climb")), Estimate(x / here.alpha, noise("climb")))
        first = denoise(x, here)
        guess = there.mix(first.x0, first.noise)
        if here.alpha == 0 or there.sigma == 0:
            return Step(guess, first)
        second = denoise(guess, there)
        return Step(guess + there.alpha * (there.ratio - here.ratio) / 2 * (second.noise - first.noise), first)
