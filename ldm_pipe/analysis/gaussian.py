"""The denoiser of a Gaussian, in closed form: E[x0 | x] for x0 ~ N(mean, covariance) and x = alpha x0 + sigma noise.

x0 = mean + J (x - alpha mean) with J = alpha C (alpha^2 C + sigma^2 I)^-1 (the conditional mean of jointly Gaussian vectors).
Works in float64 on every path and, through `network`, for every prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.level import Level, Path
from ldm_pipe.model import Estimate, Network
from ldm_pipe.prediction import Prediction


@dataclass(frozen=True, eq=False)
class Gaussian:
    """x0 ~ N(mean, covariance). mean: [D], covariance: [D,D], float64; images of D = C*H*W values in any shape."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def isotropic(cls, mean: Tensor, deviation: float) -> Gaussian:
        """N(mean, deviation^2 I)."""
        flat = mean.flatten().double()
        return cls(flat, deviation**2 * torch.eye(len(flat), dtype=torch.float64))

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        """The Denoiser: exact estimates of x [B,...]. At sigma = 0 x0 is x / alpha; at alpha = 0 it is the mean."""
        flat = x.reshape(len(x), -1).to(self.mean)
        x0 = (self.mean + (flat - level.alpha * self.mean) @ self.gain(level).T).reshape(x.shape).to(x)
        return Estimate(x0, self._noise(flat, level).reshape(x.shape).to(x))

    def gain(self, level: Level) -> Tensor:
        """J: [D,D]. Float levels only."""
        a, s = float(level.alpha), float(level.sigma)
        eye = torch.eye(len(self.mean), dtype=self.mean.dtype)
        return eye / a if s == 0 else a * torch.linalg.solve(self._marginal(a, s), self.covariance)

    def _marginal(self, a: float, s: float) -> Tensor:
        return a * a * self.covariance + s * s * torch.eye(len(self.mean), dtype=self.mean.dtype)

    def _noise(self, flat: Tensor, level: Level) -> Tensor:
        """E[noise | x] = sigma (alpha^2 C + sigma^2 I)^-1 (x - alpha mean): no division by sigma, right at every level."""
        a, s = float(level.alpha), float(level.sigma)
        if s == 0:
            return torch.zeros_like(flat)
        return s * torch.linalg.solve(self._marginal(a, s), (flat - a * self.mean).T).T

    def network(self, path: Path, prediction: Prediction) -> Network:
        """A raw network on `path` that predicts as `prediction` does: Model(it, path, prediction) is this denoiser again."""
        scaled = Gaussian(self.mean / path.data_std, self.covariance / path.data_std**2)

        def output(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
            _, own = path.rescale(path.level(float(time[0])))
            estimate = scaled(x, own)
            return prediction.target(estimate.x0, estimate.noise, own)

        return output

    def flow(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """The exact probability-flow map from `here` to `there`, [B,...] (what a perfect ODE solver returns).

        Along an eigenvector of C with eigenvalue c, x - alpha m scales as sqrt(alpha^2 c + sigma^2).
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        flat = (x.reshape(len(x), -1).to(self.mean) - here.alpha * self.mean) @ vectors
        grow = ((there.alpha**2 * values + there.sigma**2) / (here.alpha**2 * values + here.sigma**2)).sqrt()
        return (there.alpha * self.mean + (flat * grow) @ vectors.T).reshape(x.shape).to(x)


def log_density(gaussian: Gaussian, x0: Tensor) -> Tensor:
    """log N(x0; mean, covariance) in nats, [B]."""
    away = x0.reshape(len(x0), -1).to(gaussian.mean) - gaussian.mean
    solved = torch.linalg.solve(gaussian.covariance, away.T).T
    dim = len(gaussian.mean)
    return -0.5 * ((away * solved).sum(1) + torch.logdet(gaussian.covariance) + dim * math.log(2 * math.pi))
