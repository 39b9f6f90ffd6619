"""Starting part of the way down from a first estimate of the image.

SDEdit, Meng et al. 2021, arXiv 2108.01073, algorithm 1; Come-Closer-Diffuse-Faster (CCDF), Chung et al. 2021, arXiv 2112.05146,
algorithm 1, whose data step after each step is that of `ilvr` as the sampler; DifFace, Yue and Loy 2022, arXiv 2212.06512,
whose estimate is another network's (400 of 1000 levels, ddim with eta .5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True, eq=False)
class Truncated(Sampler):
    """Another sampler from the estimate, noised to the first level; that is to be one in the middle (`levels.tail`).

    estimate: [B,C,H,W] or [1,C,H,W]; by default A+ y. CCDF starts at .1 to .3 of the levels.
    """

    measurement: Measurement
    sampler: Sampler
    estimate: Tensor | None = None

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The estimate noised to the level."""
        first = self.estimate
        if first is None:
            first = self.measurement.operator.prox(noise.new_zeros(noise.shape), 0.0, self.measurement.y)
        return level.mix(first, noise)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """The sampler's."""
        return self.sampler.step(denoise, x, here, there, memory, noise)
