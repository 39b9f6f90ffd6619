"""Latent Consistency Models, Luo et al. 2023, arXiv 2310.04378; Consistency Models, Song et al. 2023, arXiv
2303.01469, algorithm 1: multistep consistency sampling.

The papers' boundary weights c_skip and c_out belong to the network that was distilled with them; at every time of 5 and more
they differ from 0 and 1 by less than 1e-4 (timestep scaling 10), and here the estimate's x0 is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class LCM(Sampler):
    """Consistency sampling for distilled networks: x0, and then all of the noise anew; 1 to 8 steps.

    It is the kernel of DDRM with eta 1: with a network that was not distilled detail is lost at every step, however many.
    """

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """alpha' x0 + sigma' z; the step into sigma = 0 returns x0."""
        estimate = denoise(x, here)
        if there.sigma == 0:
            return Step(there.alpha * estimate.x0, estimate)
        return Step(there.mix(estimate.x0, noise("step")), estimate)
