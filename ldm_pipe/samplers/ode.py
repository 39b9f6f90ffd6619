"""The probability-flow ODE solved to a tolerance: Score-Based Generative Modeling through Stochastic Differential Equations,
Song et al. 2020, arXiv 2011.13456, section 4.3 (there scipy's RK45; the log-likelihood of the same ODE is
`analysis.log_likelihood`).

In flow coordinates, y = x / (alpha + sigma) over u, the ODE is dy/du = noise - x0 for every path, finite at alpha = 0 and
smooth down to sigma = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.runge_kutta import integrate
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class ODE(Sampler):
    """Dormand and Prince's adaptive Runge-Kutta method on the probability-flow ODE, as many evaluations as the tolerance asks.

    The levels only say where it stops on the way, so that one step is enough. The end is x0 at the level of u = `least`.

    tolerance: of the error of every inner step, absolute and relative; the paper takes 1e-5 in float64,
    which a network in fp32 answers with twelve times the evaluations and no visible change. least: where the ODE ends,
    above 0; below a table's first level a network is asked at that level, so that nothing is gained there.
    """

    tolerance: float = 1e-3
    least: float = 0.01
    calls: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not (1e-12 <= self.tolerance <= 1 and 0 < self.least < 1):
            raise UsageError(f"ode: tolerance takes 1e-12 to 1, least 0 to 1; got {self.tolerance:g} and {self.least:g}")

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """7 evaluations or more; one from `least` on into sigma = 0."""
        seen: list[Estimate] = []

        def velocity(u: float, y: Tensor) -> Tensor:
            estimate = denoise(y, Level(1 - u, u))
            if not seen:  # the estimate at `here`
                seen.append(estimate)
            return estimate.noise - estimate.x0

        start, end = float(here.u), max(float(there.u), self.least if there.sigma == 0 else 0.0)
        y = x / (here.alpha + here.sigma)
        if start > end:
            y = integrate(velocity, y, start, end, self.tolerance)
        if there.sigma == 0:
            last = denoise(y, Level(1 - end, end) if start > end else Level(1 - start, start))
            return Step(there.alpha * last.x0, last)
        if start <= end:
            return Step(y * (there.alpha + there.sigma), denoise(x, here))
        return Step(y * (there.alpha + there.sigma), seen[0])
