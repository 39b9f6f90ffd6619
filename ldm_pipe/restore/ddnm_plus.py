"""DDNM+ for noisy measurements: Wang et al. 2022, arXiv 2212.00490, section 3.3 (eq. 17-19) and appendix (by singular values).

Per singular direction, so that the noise of the data counts towards the noise of the next level. As the data's noise falls to
0 the range space gets fresh noise, where `ddnm` keeps the network's: the two do not meet at deviation 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.operator import Measurement, ancestral
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DDNMPlus(Sampler):
    """DDNM for noisy data; owns its kernel. 100 steps in the paper.

    With t = alpha_s deviation / s_i the data's noise at the next level, along the i-th direction: if sigma_s >= t the data
    replace x0 and noise is added up to sigma_s; else they correct it by the part sigma_s sqrt(1 - eta^2) / t. eta: the share of
    fresh noise where A sees nothing, as in `renoise`.
    """

    measurement: Measurement
    eta: float = 0.85

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step, in coefficients of V."""
        estimate = denoise(x, here)
        a = self.measurement.linear.spectrum(tuple(x.shape[1:]), x)
        x0, y = a.vt(estimate.x0), a.measured(self.measurement.y)
        kept = there.sigma * (1 - self.eta**2) ** 0.5
        theta = there.alpha * self.measurement.deviation / a.safe
        enough = theta <= there.sigma
        gain = torch.where(enough, 1.0, kept / torch.where(enough, 1.0, theta))
        mean = there.alpha * torch.where(a.known, x0 + gain * (y - x0), x0)
        mean = mean + torch.where(a.known, 0.0, kept * a.vt(estimate.noise))
        if there.sigma == 0:
            return Step(a.v(mean), estimate)
        up = (there.sigma**2 - theta**2).clamp(min=0).sqrt()
        fresh = torch.where(a.known & enough, up, self.eta * there.sigma)
        return Step(a.v(mean + fresh * a.vt(noise("step"))), estimate)


@dataclass(frozen=True)
class DDNMScaled(Sampler):
    """DDNM+ with one number for all directions, eq. 17-19, for operators whose A+ leaves the noise of the data white.

    x0 moves to x0 - lambda A+ (A x0 - y) and the variance of the ancestral kernel falls to v - (c lambda deviation)^2, c the
    weight of x0 in it and lambda = min(1, sqrt(v) / (c deviation)). Any operator that `ddnm` takes. (The official script takes
    abar for its square root there and multiplies the noise instead of replacing it.)
    """

    measurement: Measurement

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step; owns its kernel."""
        estimate, m = denoise(x, here), self.measurement
        mean, variance = ancestral(estimate.x0, x, here, there)
        weight = there.alpha * (1 - (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2)
        spread = weight * m.deviation
        gain = 1.0 if spread**2 <= variance else float(variance**0.5 / spread)
        mean = mean + gain * weight * (m.operator.prox(estimate.x0, 0.0, m.y) - estimate.x0)
        if there.sigma == 0:
            return Step(mean, estimate)
        return Step(mean + max(variance - spread**2, 0.0) ** 0.5 * noise("step"), estimate)
