"""The denoiser of a Gaussian, in closed form: E[x0 | x] for x0 ~ N(mean, covariance) and x = alpha x0 + sigma noise.

x0 = mean + J (x - alpha mean) with J = alpha C (alpha^2 C + sigma^2 I)^-1 (the conditional mean of jointly Gaussian vectors:
Pattern Recognition and Machine Learning, Bishop 2006, eq. 2.113-2.117). Everything is computed in the eigenbasis of C, where
J is diagonal, so any covariance will do, singular ones too. Works in float64 on every path and, through
`ExactNetwork`, for every prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Scalar
from ldm_pipe.model import Estimate


@dataclass(frozen=True, eq=False)
class Gaussian:
    """x0 ~ N(mean, covariance). mean: [D], covariance: [D,D]; float64 on the CPU; images of D = C*H*W values in any shape.

    A level holds floats, or one [B,1,1,1] tensor each. Raises UsageError for a matrix that is no covariance.
    """

    mean: Tensor
    covariance: Tensor
    _values: Tensor = field(init=False, repr=False)
    _vectors: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        c = self.covariance
        values, vectors = torch.linalg.eigh(c)
        most = float(values.abs().max())
        skew, least = float((c - c.T).abs().max()), float(values.min())
        if c.dtype != torch.float64 or skew > 1e-10 * most or least < -1e-10 * most:
            raise UsageError("a covariance is float64, symmetric and has no negative eigenvalue")
        object.__setattr__(self, "_values", torch.where(values < 1e-14 * most, 0.0, values))  # rounding made those
        object.__setattr__(self, "_vectors", vectors)

    @classmethod
    def isotropic(cls, mean: Tensor, deviation: float) -> Gaussian:
        """N(mean, deviation^2 I)."""
        flat = mean.flatten().double()
        return cls(flat, deviation**2 * torch.eye(len(flat), dtype=torch.float64))

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        """The Denoiser: exact estimates of x [B,...]. At sigma = 0 x0 is x / alpha; at alpha = 0 it is the mean."""
        a, s = _column(level.alpha), _column(level.sigma)
        along, spread = self._along(x, a), a * a * self._values + s * s
        x0 = self.mean + (along * torch.where(s == 0, 1 / a, a * self._values / spread)) @ self._vectors.T
        noise = (along * torch.where(s == 0, 0.0, s / spread)) @ self._vectors.T  # not via x0: no division by sigma
        return Estimate(x0.reshape(x.shape).to(x), noise.reshape(x.shape).to(x))

    def gain(self, level: Level) -> Tensor:
        """J, the derivative of x0 by x: [D,D]. Float levels only."""
        a, s = float(level.alpha), float(level.sigma)
        return self._matrix(torch.full_like(self._values, 1 / a) if s == 0 else a * self._values / self._spread(level))

    def posterior(self, level: Level) -> Tensor:
        """The covariance of x0 given x, C - alpha J C = sigma^2 C (alpha^2 C + sigma^2 I)^-1: [D,D]. Float levels only."""
        s = float(level.sigma)
        return self._matrix(torch.zeros_like(self._values) if s == 0 else s * s * self._values / self._spread(level))

    def score(self, x: Tensor, level: Level) -> Tensor:
        """The gradient of log p(x) at the level, [B,...]. Raises UsageError at sigma = 0 where C is singular.

        For any measurement y of x0, `measured(...).score - score` is the gradient of log p(y | x): exact guidance.
        """
        spread = self._density_spread(level)
        return (-(self._along(x, _column(level.alpha)) / spread) @ self._vectors.T).reshape(x.shape).to(x)

    def log_density(self, x: Tensor, level: Level = CLEAN) -> Tensor:
        """log p(x) at the level in nats, [B]. Raises UsageError at sigma = 0 where C is singular."""
        along, spread = self._along(x, _column(level.alpha)), self._density_spread(level)
        return -0.5 * (along.square() / spread + spread.log() + math.log(2 * math.pi)).sum(1)

    def measured(self, operator: Tensor, y: Tensor, deviation: float) -> Gaussian:
        """The distribution of x0 given y = operator x0 + deviation * noise: its denoiser is E[x0 | x, y].

        operator: [M,D]; y: M values. The covariance is in Joseph's form, which stays positive under rounding (Filtering for
        Stochastic Processes, Bucy and Joseph 1968). Raises UsageError where y has no density: rows of the operator that
        depend on each other, with deviation 0.
        """
        c, eye = self.covariance, torch.eye(len(self.mean), dtype=self.mean.dtype)
        of_y = operator @ c @ operator.T + deviation**2 * torch.eye(len(operator), dtype=c.dtype)
        values = torch.linalg.eigvalsh(of_y)
        if float(values[0]) <= 1e-14 * float(values[-1]):
            raise UsageError("the measurement has rows that depend on each other; leave them out or give a deviation above 0")
        gain = torch.linalg.solve(of_y, operator @ c).T  # K = C A' (A C A' + deviation^2 I)^-1
        keep = eye - gain @ operator
        covariance = keep @ c @ keep.T + deviation**2 * gain @ gain.T
        return Gaussian(self.mean + gain @ (y.flatten() - operator @ self.mean), (covariance + covariance.T) / 2)

    def mapped(self, matrix: Tensor, offset: Tensor | float = 0.0) -> Gaussian:
        """The distribution of matrix x0 + offset (a linear decoder, say). matrix: [E,D]; offset: [E]."""
        covariance = matrix @ self.covariance @ matrix.T
        return Gaussian(matrix @ self.mean + offset, (covariance + covariance.T) / 2)

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """Independent draws of x0, [count,D]; the same on every machine."""
        z = np.random.Generator(np.random.Philox(key=seed)).standard_normal((count, len(self.mean)))
        return self.mean + (torch.from_numpy(z) * self._values.sqrt()) @ self._vectors.T

    def flow(self, x: Tensor, here: Level, there: Level) -> Tensor:
        """The exact probability-flow map from `here` to `there`, [B,...] (what a perfect ODE solver returns).

        Along an eigenvector of C with eigenvalue c, x - alpha m scales as sqrt(alpha^2 c + sigma^2). Float levels only.
        """
        before, after = self._spread(here), self._spread(there)
        grow = torch.where(before == 0, 0.0, after / before).sqrt()
        end = there.alpha * self.mean + (self._along(x, _column(here.alpha)) * grow) @ self._vectors.T
        return end.reshape(x.shape).to(x)

    def _along(self, x: Tensor, alpha: Tensor) -> Tensor:
        """x - alpha mean in the eigenbasis, [B,D]."""
        return (x.reshape(len(x), -1).to(self.mean) - alpha * self.mean) @ self._vectors

    def _spread(self, level: Level) -> Tensor:
        """The variances of x in the eigenbasis, [B,D] or [1,D]."""
        return _column(level.alpha) ** 2 * self._values + _column(level.sigma) ** 2

    def _density_spread(self, level: Level) -> Tensor:
        spread = self._spread(level)
        if bool((spread == 0).any()):
            raise UsageError("a singular covariance has no density at sigma = 0")
        return spread

    def _matrix(self, values: Tensor) -> Tensor:
        return (self._vectors * values) @ self._vectors.T


def _column(value: Scalar) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1)
