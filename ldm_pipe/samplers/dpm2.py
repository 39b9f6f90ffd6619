"""DPM-Solver-2's midpoint rule, k-diffusion's `sample_dpm_2` and `sample_dpm_2_ancestral`.

DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps, Lu et al. 2022, arXiv 2206.00927,
its second-order solver with r = 1/2, in the coordinates of Karras et al. 2022, arXiv 2206.00364: y = x / alpha, s = sigma /
alpha, dy/ds = noise, with the noise of the middle of the step in log s for the whole of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.expansion import between, fall
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DPM2(Sampler):
    """Second order with two evaluations a step: the noise of the middle of the step.

    The middle is that of log(sigma / alpha). The steps out of alpha = 0 and into sigma = 0 are Euler's.
    """

    calls: ClassVar[int] = 2

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one at an end point."""
        return _midpoint(denoise, x, here, there)


@dataclass(frozen=True)
class DPM2Ancestral(Sampler):
    """DPM2 to a level below the next one, then fresh noise up to it; two evaluations a step.

    The noise is that of Euler ancestral. The steps out of alpha = 0 and into sigma = 0 are Euler ancestral's.

    eta: 0 is DPM2, 1 is ancestral.
    """

    eta: float = 1.0
    calls: ClassVar[int] = 2

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one at an end point."""
        fresh = min(1.0, self.eta * (1 - fall(here, there) ** 2) ** 0.5)
        below = Level(there.alpha, (1 - fresh**2) ** 0.5 * there.sigma)
        done = _midpoint(denoise, x, here, below)
        if fresh == 0 or there.sigma == 0:
            return done
        return done._replace(x=done.x + fresh * there.sigma * noise("step"))


def _midpoint(denoise: Denoiser, x: Tensor, here: Level, there: Level) -> Step:
    first = denoise(x, here)
    x = there.mix(first.x0, first.noise)
    if here.alpha == 0 or there.sigma == 0:
        return Step(x, first)
    middle = between(here, there, 0.5)
    second = denoise(middle.mix(first.x0, first.noise), middle)
    return Step(x + there.alpha * (there.ratio - here.ratio) * (second.noise - first.noise), first)
