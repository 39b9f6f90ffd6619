"""The guidance that the others approximate, for a Gaussian prior: the yardstick of the restoration methods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.restore.operator import Measurement, shifted


@dataclass(frozen=True, eq=False)
class ExactGuidance:
    """The score moves by the gradient of log p(y | x), J' A' (A S A' + deviation^2)^-1 (y - A x0), for x0 ~ N(m, covariance).

    covariance: [D,D], D = C * H * W, float64 (small images only); S = Cov(x0 | x) and J = d x0 / d x follow from it, and the
    denoiser must be that prior's. Jointly Gaussian vectors: Pattern Recognition and Machine Learning, Bishop 2006, eq.
    2.113-2.117.
    """

    measurement: Measurement
    covariance: Tensor

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The posterior's denoiser."""

        def guide(x: Tensor, level: Level) -> Estimate:
            estimate, c = denoise(x, level), self.covariance
            eye = torch.eye(len(c), dtype=c.dtype)
            rows = self.measurement.operator(eye.reshape(-1, *x.shape[1:])).flatten(1)  # A', [D,M]
            inverse = torch.linalg.inv(level.alpha**2 * c + level.sigma**2 * eye)
            of_y = rows.T @ (level.sigma**2 * c @ inverse) @ rows
            of_y = of_y + self.measurement.deviation**2 * torch.eye(len(of_y), dtype=c.dtype)
            pull = torch.linalg.pinv((of_y + of_y.T) / 2, hermitian=True) @ rows.T @ (level.alpha * c @ inverse)
            score = self.measurement.misfit(estimate.x0).flatten(1) @ pull
            return shifted(estimate, score.reshape(x.shape), x, level)

        return guide
