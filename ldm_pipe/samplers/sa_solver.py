"""SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models, Xue et al. 2023, arXiv 2309.05019.

Data prediction, algorithm 1: with lambda = log(alpha / sigma) and tau constant over a step h,

    x' = (sigma' / sigma) e^(-tau^2 h) x + sigma' int (1 + tau^2) e^(lambda - tau^2 (lambda' - lambda)) x0 dlambda
         + sigma' sqrt(1 - e^(-2 tau^2 h)) z

with x0 the polynomial through the last values (Adams-Bashforth), then through the new one too (Adams-Moulton, same z). With two
values the line's weight is h / 2 of its slope, as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.expansion import History, bend, check_order, exponential, fall, remember, same
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class SASolver(Sampler):
    """Stochastic Adams: a multistep predictor and corrector on x0 for the SDE of any noise strength tau.

    One evaluation a step. Orders grow with the steps done; steps out of alpha = 0 and into sigma = 0 are first order. The
    correction is written as what it adds to x, so that a caller's edits of x stay.

    predictor: 1 to 3 values. corrector: 2 to 4 values, the new one among them; 0 is none. tau: 0 is the ODE, 1 the reverse SDE;
    taken where low <= sigma / alpha <= high at the start of a step, 0 elsewhere (the paper's interval for EDM networks).
    """

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    low: float = 0.05
    high: float = 1.0

    def __post_init__(self) -> None:
        check_order("sa_solver", self.predictor, 3, "predictor")
        if self.corrector not in (0, 2, 3, 4):
            raise UsageError(f"sa_solver: corrector is {self.corrector}; it takes 0 (none) or 2 to 4")

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (lambda, x0) of the last levels, what the last predictor added to x / alpha, and its 1 + tau^2."""
        estimate = denoise(x, here)
        x0, mixed, place = estimate.x0, estimate.noise, here.log_snr / 2
        seen, added, rate = memory or ((), 0.0, 1.0)
        moved: Tensor | float = 0.0
        if self.corrector and seen and not same(seen[0][0], place):
            moved = self._correct(seen[: self.corrector - 1], place, x0, rate) - added
        seen = remember(seen, place, x0, max(self.predictor, self.corrector - 1))
        if there.sigma == 0:
            return Step(there.mix(x0, mixed), estimate, (seen, 0.0, 1.0))
        rate = 1 + (self.tau if self.low <= here.ratio <= self.high else 0.0) ** 2
        kept = fall(here, there) ** (rate - 1)  # e^(-tau^2 h)
        if kept < 1:
            mixed = kept * mixed + (1 - kept**2) ** 0.5 * noise("step")
        added = self._predict(seen[: self.predictor], there.log_snr / 2, rate)
        # x0 stays as it was seen, so what the correction adds to x / alpha goes into the noise and shrinks with it.
        x = there.mix(x0, mixed) + there.alpha * (fall(here, there) * kept * moved + added)
        return Step(x, estimate, (seen, added, rate))

    @staticmethod
    def _predict(seen: History, end: float, rate: float) -> Tensor | float:
        if len(seen) == 2:
            (now, x0), (last, before) = seen
            return rate * (end - now) ** 2 / 2 * (x0 - before) / (now - last)
        return rate * bend(seen, exponential(seen[0][0], end, rate)) if seen else 0.0

    @staticmethod
    def _correct(seen: History, place: float, x0: Tensor, rate: float) -> Tensor | float:
        now, before = seen[0]
        if len(seen) == 1:
            return rate * (place - now) / 2 * (x0 - before)
        return rate * bend((seen[0], (place, x0), *seen[1:]), exponential(now, place, rate))
