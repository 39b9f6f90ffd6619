"""Denoising Diffusion Probabilistic Models, Ho et al. 2020, arXiv 2006.11239: ancestral sampling.

Written for any pair of levels on any path: with r = alpha_t / alpha_s and b = sigma_t^2 - r^2 sigma_s^2 the posterior
q(x_s | x_t, x0) has mean (alpha_s b x0 + r sigma_s^2 x_t) / sigma_t^2 and variance b sigma_s^2 / sigma_t^2 (eq. 6 and 7 on the
VP circle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Scalar
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, Step


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling: a draw from the posterior q(x_s | x_t, x0) at every step.

    variance: "small" is the posterior's (sigma_t^2 = beta-tilde), "large" is beta_t, "learned" interpolates their
    logarithms by the network's own output (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15).
    """

    variance: Literal["small", "large", "learned"] = "small"

    def step(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """Draw from the posterior; the step to sigma = 0 returns x0."""
        estimate = denoise(x, here)
        if there.sigma == 0:
            return Step(there.alpha * estimate.x0, estimate)
        r = here.alpha / there.alpha
        b = here.sigma**2 - (r * there.sigma) ** 2
        mean = (there.alpha * b * estimate.x0 + r * there.sigma**2 * x) / here.sigma**2
        small = b * there.sigma**2 / here.sigma**2
        # beta_t on the VP circle, carried to the scale of `there`.
        large = b * (there.alpha**2 + there.sigma**2) / (here.alpha**2 + here.sigma**2)
        return Step(mean + self._deviation(estimate.log_var, small, large) * noise("step"), estimate)

    def _deviation(self, log_var: Tensor | None, small: Scalar, large: Scalar) -> Tensor | float:
        if self.variance != "learned":
            return (small if self.variance == "small" else large) ** 0.5
        if log_var is None:
            raise UsageError("variance 'learned' needs a network with 2C output channels; choose small or large")
        part = (log_var + 1) / 2
        bounds = torch.tensor([small, large], dtype=torch.float64).log().tolist()
        return (0.5 * (part * bounds[1] + (1 - part) * bounds[0])).exp()
