"""Several denoisers along one walk, each for a range of levels: base and refiner, or experts by noise.

SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, Podell et al. 2023, arXiv 2307.01952, section 2.5
(base and refiner in one latent space); eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers, Balaji
et al. 2022, arXiv 2211.01324.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True, eq=False)
class Refine:
    """A Guide: below a level another denoiser takes over, half-open: `by` has u < below, the guided one u >= below.

    Several of them nest: the one applied last decides first. below: 0..1 of u = sigma / (alpha + sigma).
    """

    by: Denoiser
    below: float

    def __post_init__(self) -> None:
        if not 0 <= self.below <= 1:
            raise UsageError(f"refine: below is {self.below}; it takes 0 to 1")

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser of both stages."""

        def staged(x: Tensor, level: Level) -> Estimate:
            return (self.by if float(level.u) < self.below else denoise)(x, level)

        return staged


@dataclass(frozen=True)
class Relay(Wrapping):
    """Another sampler whose memory is dropped where a step leaves a border behind: what one stage estimated says nothing of
    the next one's slope (a pipeline each, as of SDXL, has the same effect). borders: of u, as in `Refine`."""

    sampler: Sampler
    borders: tuple[float, ...]

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """The sampler's step; nothing is remembered across a border."""
        done = super().down(denoise, x, here, there, memory, noise)
        crossed = any(float(there.u) < b <= float(here.u) for b in self.borders)
        return done._replace(memory=None) if crossed else done
