"""DEIS: Fast Sampling of Diffusion Models with Exponential Integrator, Zhang and Chen 2022, arXiv 2204.13902.

The Adams-Bashforth kind (AB-DEIS): with y = x / alpha and s = sigma / alpha the ODE is dy/ds = noise, and
the noise is extrapolated by the polynomial through its last values. tAB-DEIS interpolates in the network's time, which levels
do not have; here it is log s, as in diffusers' `DEISMultistepScheduler`, or s itself (rhoAB-DEIS, which is LMS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldm_pipe.expansion import bend, check_order, exponential, lebesgue, remember
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DEIS(Sampler):
    """DEIS: exponential Adams-Bashforth on the noise, one evaluation a step.

    The order grows from 1 with the steps done; steps out of alpha = 0 and into sigma = 0 are first order.

    order: 1 to 4 values of the noise (the paper's tAB3 has 4). interpolate: the noise as a polynomial in "log_rho" or in "rho",
    with rho = sigma / alpha.
    """

    order: int = 3
    interpolate: Literal["log_rho", "rho"] = "log_rho"

    def __post_init__(self) -> None:
        check_order("deis", self.order, 4)

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (place, noise) of the last `order` levels."""
        estimate = denoise(x, here)
        logs = self.interpolate == "log_rho"
        seen = remember(memory, here.log_snr / 2 if logs else here.ratio, estimate.noise, self.order)
        x = there.mix(estimate.x0, estimate.noise)
        if len(seen) > 1 and there.sigma != 0:
            if logs:  # ds = -s dlambda, and s = s' e^(lambda' - lambda)
                x = x - there.sigma * bend(seen, exponential(seen[0][0], there.log_snr / 2, -1.0))
            else:
                x = x + there.alpha * bend(seen, lebesgue(here.ratio, there.ratio))
        return Step(x, estimate, seen)
