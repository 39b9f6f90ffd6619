"""EDM's stochastic sampler: Elucidating the Design Space of Diffusion-Based Generative Models, Karras et al. 2022, arXiv
2206.00364.

Algorithm 2: noise is added to x up to a higher level, and Heun's step goes down from there. s = sigma / alpha is the paper's
sigma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class Churn(Sampler):
    """EDM's stochastic Heun: a little noise added before every step, two evaluations a step.

    The steps out of alpha = 0 and into sigma = 0 are Euler's, and no noise is added before them.

    gamma: by which part sigma / alpha is raised, the paper's S_churn / N (40 / 256 for ImageNet-64), where s_min <= sigma /
    alpha <= s_max; 0 is Heun's with average "ve". s_noise: the deviation of the added noise; a little above 1 makes up for
    detail that networks lose.
    """

    gamma: float = 0.15625
    s_min: float = 0.05
    s_max: float = 50.0
    s_noise: float = 1.003
    calls: ClassVar[int] = 2

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one at an end point."""
        if here.alpha == 0 or there.sigma == 0:
            estimate = denoise(x, here)
            return Step(there.mix(estimate.x0, estimate.noise), estimate)
        if self.gamma > 0 and self.s_min <= here.ratio <= self.s_max:
            raised = Level(here.alpha, here.sigma * (1 + self.gamma))
            x = x + self.s_noise * (raised.sigma**2 - here.sigma**2) ** 0.5 * noise("step")
            here = raised
        first = denoise(x, here)
        guess = there.mix(first.x0, first.noise)
        second = denoise(guess, there)
        return Step(guess + there.alpha * (there.ratio - here.ratio) / 2 * (second.noise - first.noise), first)
