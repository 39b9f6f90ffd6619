"""Score-Based Generative Modeling through Stochastic Differential Equations, Song et al. 2020, arXiv 2011.13456: predictors
(appendices D to F) and the Langevin corrector (algorithms 2 to 5) for the VE, VP and sub-VP SDE.

The SDE is a choice of coordinates: any level is carried to the alpha and sigma which that SDE has at the same sigma / alpha,
and the step is discretised there, with r = alpha_t / alpha_s, b = sigma_t^2 - r^2 sigma_s^2 and the score -noise / sigma_t:

    reverse diffusion   x_s = (2 - r) x + b score + sqrt(b) z   (the forward transition turned around, eq. 46)
    ancestral           the posterior's mean (x + b score) / r, variance b (VP, eq. 4) or b sigma_s^2 / sigma_t^2 (VE, eq. 47)
    Euler-Maruyama      the reverse SDE over its own clock: the integral of beta (VP, sub-VP); VE: reverse diffusion
    Langevin            x + e score + sqrt(2 e) z,  e = 2 a (snr |z| / |score|)^2,  a = r^2 of the step (VP), 1 (VE)

Of what the official code does two things are otherwise here: norms are those of each image and not a batch's mean, so that an
image does not depend on its batch; and the walk ends with the noise-free mean E[x0 | x], exact at any last level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.samplewise import norm
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class ScoreSDE(Sampler):
    """Predictor-corrector: a step of the reverse SDE, then Langevin steps at the level that was reached (1 + corrections
    calls).

    The step into sigma = 0 is the mean, with one evaluation. Many steps are needed: the paper takes 1000.

    sde: whose discretisation. predictor: see the file; "euler_maruyama" and "ve" cannot leave alpha = 0. corrections: Langevin
    steps; 0 is the predictor alone. snr: their signal-to-noise ratio (the paper's .16 for VE and CIFAR-10; smaller for VP).
    """

    sde: Literal["vp", "ve", "sub_vp"] = "vp"
    predictor: Literal["reverse_diffusion", "ancestral", "euler_maruyama"] = "reverse_diffusion"
    corrections: int = 1
    snr: float = 0.16
    calls: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not (0 <= self.corrections <= 100 and 0 <= self.snr < 10):
            raise UsageError(f"score_sde: corrections is 0 to 100, snr 0 to 10; got {self.corrections} and {self.snr:g}")
        if (self.sde, self.predictor) == ("sub_vp", "ancestral"):
            raise UsageError("score_sde: the sub-VP SDE has no ancestral predictor; choose reverse_diffusion or euler_maruyama")
        object.__setattr__(self, "calls", 1 + self.corrections)

    def start(self, noise: Tensor, level: Level) -> Tensor:
        """The SDE's prior: VP's has variance 1, those of the others are sigma's."""
        return super().start(noise, level) if self.sde == "vp" else noise * level.sigma

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Predict, then correct at `there`."""
        estimate = denoise(x, here)
        if there.sigma == 0:
            return Step(there.alpha * estimate.x0, estimate)
        a, b = self._own(here), self._own(there)
        x = self._predict(x * (a.sigma / here.sigma), estimate, a, b, noise("step")) * (there.sigma / b.sigma)
        rate = 1.0 if self.sde == "ve" else float(a.alpha / b.alpha) ** 2
        for k in range(self.corrections):
            score = -denoise(x, there).noise / there.sigma
            x = self._correct(x, score, rate, noise(f"correct {k}"))
        return Step(x, estimate)

    def _own(self, level: Level) -> Level:
        """The SDE's level of the same sigma / alpha."""
        s = level.ratio
        if math.isinf(s):
            if self.sde == "ve" or self.predictor == "euler_maruyama":
                where = "by euler_maruyama or on the VE SDE; take vp and another predictor"
                raise UsageError(f"score_sde cannot leave alpha = 0 {where}")
            return Level(0.0, 1.0)
        if self.sde == "ve":
            return Level(1.0, s)
        if self.sde == "vp":
            return Level(1 / math.hypot(1, s), s / math.hypot(1, s))
        alpha = 2 / (s + math.hypot(s, 2))  # sigma = 1 - alpha^2, eq. 29
        return Level(alpha, alpha * s)

    def _predict(self, x: Tensor, estimate: Estimate, here: Level, there: Level, z: Tensor) -> Tensor:
        r, low, high = here.alpha / there.alpha, there.sigma, here.sigma
        b, score = max(high**2 - (r * low) ** 2, 0.0), -estimate.noise / high
        if self.predictor == "ancestral":  # (x + b score) / r, without a division that alpha = 0 does not allow
            mean = there.alpha * estimate.x0 - r * low**2 * score
            return mean + (b if self.sde == "vp" else b * low**2 / high**2) ** 0.5 * z
        if self.predictor == "euler_maruyama" and self.sde != "ve":
            span = -2 * math.log(r)  # the integral of beta
            g = span * (1 - here.alpha**4 if self.sde == "sub_vp" else 1.0)
            return x + span / 2 * x + g * score + g**0.5 * z
        return (2 - r) * x + b * score + b**0.5 * z

    def _correct(self, x: Tensor, score: Tensor, rate: float, z: Tensor) -> Tensor:
        e = 2 * rate * (self.snr * norm(z) / norm(score).clamp(min=1e-30)) ** 2
        return x + e * score + (2 * e) ** 0.5 * z
