"""Heun's second-order method: three methods, by what is averaged over the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class Heun(Sampler):
    """Second order with two evaluations a step: an Euler step, then the step again with the average of both ends.

    The step into sigma = 0 is Euler's.

    average: "ve" averages dy/ds in variance-exploding coordinates (Karras et al. 2022, arXiv 2206.00364, algorithm 1; also
    diffusers' HeunDiscrete; refuses alpha = 0); "flow" averages the velocity noise - x0 over u (flow Heun); "x0" averages x0
    in the exponential integrator (as DPM-Solver++(2S) with r = 1, Lu et al. 2022, arXiv 2211.01095; any path and level).
    """

    average: Literal["ve", "flow", "x0"] = "x0"
    calls: ClassVar[int] = 2

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one into sigma = 0."""
        if self.average == "ve" and here.alpha == 0:
            raise UsageError("heun with average 've' cannot leave alpha = 0; use average 'x0' or 'flow'")
        first = denoise(x, here)
        guess = there.mix(first.x0, first.noise)
        if there.sigma == 0:
            return Step(guess, first)
        second = denoise(guess, there)
        return Step(getattr(self, f"_{self.average}")(x, here, there, first, second), first)

    @staticmethod
    def _ve(x: Tensor, here: Level, there: Level, first: Estimate, second: Estimate) -> Tensor:
        slope = (first.noise + second.noise) / 2
        return there.alpha * (x / here.alpha + (there.ratio - here.ratio) * slope)

    @staticmethod
    def _flow(x: Tensor, here: Level, there: Level, first: Estimate, second: Estimate) -> Tensor:
        slope = (first.noise - first.x0 + second.noise - second.x0) / 2
        y = x / (here.alpha + here.sigma) + (there.u - here.u) * slope
        return (there.alpha + there.sigma) * y

    @staticmethod
    def _x0(x: Tensor, here: Level, there: Level, first: Estimate, second: Estimate) -> Tensor:
        shrink = there.sigma / here.sigma
        return shrink * x + (there.alpha - shrink * here.alpha) * (first.x0 + second.x0) / 2


@dataclass(frozen=True)
class FlowHeun(Heun):
    """Heun's method on rectified flow's ODE: the velocity noise - x0 averaged over both ends of the step.

    Flow Straight and Fast, Liu et al. 2022, arXiv 2209.03003, eq. 1; the step into sigma = 0 is Euler's.
    """

    average: Literal["ve", "flow", "x0"] = "flow"
