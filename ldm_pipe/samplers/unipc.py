"""UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models, Zhao et al. 2023, arXiv 2302.04867.

UniP and UniC in their multistep form for data prediction. Where the paper solves R a = b for its coefficients, the solution
is the integral of the polynomial through all values (B(h) falls out); where it sets a = 1/2 (predictor of order 2, first
correction) B(h) stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldm_pipe.expansion import History, bend, check_order, exponential, fall, remember, same
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC: a multistep predictor, corrected by the evaluation at the end of its step; one evaluation each.

    The correction raises the order by one and is written as what it adds to x, so that a caller's edits of x stay. Steps out of
    alpha = 0 and into sigma = 0 are first order; the order grows from 1 with the steps done.

    order: of the predictor, 1 to 3. variant: B(h) = h ("bh1", unconditional models) or e^h - 1 ("bh2", guided ones). corrector:
    without it, order 1 is Euler.
    """

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    corrector: bool = True

    def __post_init__(self) -> None:
        check_order("unipc", self.order, 3)

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """memory: (lambda, x0) of the last `order` levels, and what the last step's predictor added to x / alpha."""
        estimate = denoise(x, here)
        place, (seen, added) = here.log_snr / 2, memory or ((), 0.0)
        moved = self._correct(seen, place, estimate.x0) - added if self._corrects(seen, place) else 0.0
        seen = remember(seen, place, estimate.x0, self.order)
        x = there.mix(estimate.x0, estimate.noise)
        if there.sigma == 0:
            return Step(x, estimate, (seen, 0.0))
        added = self._predict(seen, there.log_snr / 2)
        # x0 stays as it was seen, so what the correction adds to x / alpha goes into the noise and shrinks with it.
        return Step(x + there.alpha * (fall(here, there) * moved + added), estimate, (seen, added))

    def _corrects(self, seen: History, place: float) -> bool:
        return self.corrector and len(seen) > 0 and not same(seen[0][0], place)

    def _predict(self, seen: History, end: float) -> Tensor | float:
        if len(seen) != 2:
            return bend(seen, exponential(seen[0][0], end, 1.0)) if seen else 0.0
        (now, x0), (last, before) = seen
        return self._half(end - now) * (end - now) / (now - last) * (x0 - before)

    def _correct(self, seen: History, place: float, x0: Tensor) -> Tensor | float:
        now, before = seen[0]
        if len(seen) == 1:
            return self._half(place - now) * (x0 - before)
        return bend((seen[0], (place, x0), *seen[1:]), exponential(now, place, 1.0))

    def _half(self, h: float) -> float:
        """B(h) / 2; its h is -h for data prediction, and the sign is the step's."""
        return (h if self.variant == "bh1" else -math.expm1(-h)) / 2
