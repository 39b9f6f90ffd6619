"""Starting part of the way down from a first estimate of the image.

SDEdit, Meng et al. 2021, arXiv 2108.01073, algorithm 1; DifFace, Yue and Loy 2022, arXiv 2212.06512, whose estimate is another
network's (400 of 1000 levels, ddim with eta .5); Come-Closer-Diffuse-Faster (CCDF), Chung et al. 2021, arXiv 2112.05146,
algorithm 1, which puts the data in after each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.levels import tail
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True, eq=False)
class Truncated(Wrapping):
    """Another sampler from the estimate, noised to a level in the middle: SDEdit, and DifFace where a network estimates.

    estimate: [B,C,H,W] or [1,C,H,W]; by default the operator's first guess, A+ y. strength: the share of the levels that is
    walked, above 0 to 1; SDEdit takes .4 to .5, DifFace .4, CCDF .1 to .3.
    """

    measurement: Measurement
    sampler: Sampler
    estimate: Tensor | None = None
    strength: float = 0.4

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """The tail of them."""
        return self.sampler.walk(tail(levels, self.strength))

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The estimate noised to the level."""
        first = self.estimate
        if first is None:
            first = self.measurement.operator.guess(noise, self.measurement.y, self.measurement.deviation)
        return level.mix(first, noise)


@dataclass(frozen=True, eq=False)
class CCDF(Truncated):
    """The same with the data put in after every step, noised to the level that is reached (linear operators only).

    The step is CCDF's x <- B x + b with B = 1 - A+ A, which is not expansive: two walks come nearer at every step.
    """

    measurement: Measurement
    sampler: Sampler
    estimate: Tensor | None = None
    strength: float = 0.2

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """The sampler's step, and the data."""
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        return done._replace(x=self.measurement.merged(done.x, there, noise))
