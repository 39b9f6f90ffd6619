"""RePaint: Inpainting Using Denoising Diffusion Probabilistic Models, Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1.

With its misprints put right: the known part is noised to the level that is reached, sqrt(abar_s) x0 + sqrt(1 - abar_s) z (line
5), and a rise from s to t adds the noise of that very transition, 1 - abar_t / abar_s (line 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement, climb
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class RePaint(Sampler):
    """Merge the noised known part after every step of another sampler (ancestral in the paper), and go back up at times.

    Goes with the levels of `restore.jumps.jumps`: 250 steps, 10 up and 10 down again, 10 times over. Where the levels rise,
    noise is added and the network is not asked. Any linear operator will do, a mask is the paper's; at the end the data are
    met exactly (the official code merges before a step and not after the last).
    """

    travels = True

    measurement: Measurement
    sampler: Sampler

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The sampler's."""
        return self.sampler.start(noise, level)

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Down: the sampler's step, merged at `there`. Up: more noise, and x as its own estimate."""
        if float(there.u) > float(here.u):
            return Step(climb(x, here, there, noise("climb")), Estimate(x / here.alpha, noise("climb")))
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        seen = self.measurement.noised(there, noise("data")) if there.sigma else there.alpha * self.measurement.y
        return done._replace(x=self.measurement.linear.prox(done.x, 0.0, seen))
