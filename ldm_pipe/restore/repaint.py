"""RePaint: Inpainting Using Denoising Diffusion Probabilistic Models, Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1.

With its misprints put right: the known part is noised to the level that is reached, sqrt(abar_s) x0 + sqrt(1 - abar_s) z (line
5), and a rise from s to t adds the noise of that very transition, 1 - abar_t / abar_s (line 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.levels import jumps
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True)
class RePaint(Wrapping):
    """Merge the noised known part after every step of another sampler (ancestral in the paper), and go back up at times.

    length, times: of the jumps; the paper goes 10 of 250 steps up and down again, 10 times over. Any linear operator will do,
    a mask is the paper's; at the end the data are met exactly (the official code merges before a step, not after the last).
    """

    travels: ClassVar[bool] = True  # type: ignore[misc]

    measurement: Measurement
    sampler: Sampler
    length: int = 10
    times: int = 10

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """With the jumps."""
        return jumps(self.sampler.walk(levels), self.length, self.times)

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """The sampler's step, merged at `there`."""
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        return done._replace(x=self.measurement.merged(done.x, there, noise))
