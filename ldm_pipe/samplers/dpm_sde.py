"""DPM-Solver++ for the SDE in single steps, k-diffusion's `sample_dpmpp_sde` with r = 1/2.

DPM-Solver++(2S), Lu et al. 2022, arXiv 2211.01095, algorithm 1, with each of its two stages taken to a level below its own and
fresh noise added up to it, as Euler ancestral does. Both stages see one Brownian path over s = sigma / alpha: with the middle m
of the step from s to t, their draws have the correlation sqrt((s - m) / (s - t)). (That keeps the moments second order; with
draws that know nothing of each other they are first order.)
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
class DPMSDE(Sampler):
    """DPM-Solver++ SDE: two evaluations a step, with fresh noise in both.

    The second one lies halfway in log(alpha / sigma). The steps out of alpha = 0 and into sigma = 0 are Euler ancestral's.

    eta: 0 is DPM-Solver++(2S), 1 is the reverse SDE.
    """

    eta: float = 1.0
    calls: ClassVar[int] = 2

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """sigma * noise."""
        return noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Two evaluations, or one at an end point."""
        first = denoise(x, here)
        fresh, kept = self._split(fall(here, there))
        draw: Tensor | float = noise("step") if fresh > 0 and there.sigma != 0 else 0.0
        mixed = kept * first.noise + fresh * draw
        if here.alpha == 0 or there.sigma == 0:
            return Step(there.mix(first.x0, mixed), first)
        inside = between(here, there, 0.5)
        half = fall(here, inside)
        up, down = self._split(half)
        if up > 0:  # the middle's draw is the first part of the step's: s - m over s - t is 1 / (1 + m / s)
            share = 1 / (1 + half)
            draw = share**0.5 * draw + (1 - share) ** 0.5 * noise("middle")
        second = denoise(inside.mix(first.x0, down * first.noise + up * draw), inside)
        moved = (1 - fall(here, there) * kept) * (second.x0 - first.x0)
        return Step(there.mix(first.x0, mixed) + there.alpha * moved, first)

    def _split(self, q: float) -> tuple[float, float]:
        """(fresh, kept) shares of the noise where sigma / alpha falls by q."""
        fresh = min(1.0, self.eta * (1 - q * q) ** 0.5)
        return fresh, (1 - fresh**2) ** 0.5
