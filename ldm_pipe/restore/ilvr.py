"""ILVR: Conditioning Method for Denoising Diffusion Probabilistic Models, Choi et al. 2021, arXiv 2108.02938, algorithm 1.

With the projection A+A in the place of the paper's down- and upsampling, and the reference noised to the level that is reached
(the official code takes the one before): the data are met exactly at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True)
class ILVR(Wrapping):
    """After a step of another sampler (ancestral in the paper, 100 steps), what A sees of x becomes the noised data's.

    weight: how far, 0 not at all. least: no more below this u = sigma / (alpha + sigma) in 0..1 (the paper's range), so that
    finer details become the network's own.
    """

    measurement: Measurement
    sampler: Sampler
    weight: float = 1.0
    least: float = 0.0

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler, and the data."""
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        if self.weight == 0 or float(there.u) < self.least:
            return done
        fit = self.measurement.merged(done.x, there, noise)
        return done._replace(x=fit if self.weight == 1 else done.x + self.weight * (fit - done.x))
