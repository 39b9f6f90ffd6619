"""The denoiser of a Gaussian mixture, in closed form, and everything that a mixture stays a mixture under.

Given x = alpha x0 + sigma noise, component k has the responsibility r_k ~ w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I) and, in
it, x0 is Gaussian as in `Gaussian`; E[x0 | x] is their mean under r (Pattern Recognition and Machine Learning, Bishop 2006,
eq. 9.23 and 2.113-2.117). A class label and a linear measurement of x0 only change weights, means and covariances, so each
conditional distribution is a Mixture too, and its denoiser is exact guidance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level, Scalar
from ldm_pipe.model import Estimate


class Posterior(NamedTuple):
    """x0 given x, a mixture of its own for every row: weights [B,K], means [B,K,D], covariances [B or 1,K,D,D]."""

    weights: Tensor
    means: Tensor
    covariances: Tensor


@dataclass(frozen=True, eq=False)
class Mixture:
    """x0 ~ sum_k weights_k N(means_k, covariances_k). weights: [K], 0 or more, summing to 1; means: [K,D]; covariances:
    [K,D,D]; float64 on the CPU, singular covariances too; images of D = C*H*W values in any shape.

    A level holds floats, or one [B,1,1,1] tensor each. Raises UsageError for weights or matrices that are none.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    _values: Tensor = field(init=False, repr=False)
    _vectors: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if bool((self.weights < 0).any()) or abs(float(self.weights.sum()) - 1) > 1e-9:
            raise UsageError(f"the weights of a mixture are 0 or more and sum to 1, got {self.weights.tolist()}")
        values, vectors = torch.linalg.eigh(self.covariances)
        most = values.abs().amax(1, keepdim=True)
        skew = (self.covariances - self.covariances.mT).abs().amax(1)
        if values.dtype != torch.float64 or bool(((skew > 1e-10 * most) | (values < -1e-10 * most)).any()):
            raise UsageError("a covariance is float64, symmetric and has no negative eigenvalue")
        object.__setattr__(self, "_values", torch.where(values < 1e-14 * most, 0.0, values))  # rounding made those
        object.__setattr__(self, "_vectors", vectors)

    @classmethod
    def isotropic(cls, weights: Tensor, means: Tensor, deviation: float) -> Mixture:
        """Components N(means_k, deviation^2 I)."""
        eye = torch.eye(means.shape[1], dtype=torch.float64)
        return cls(weights.double(), means.double(), (deviation**2 * eye).expand(len(means), -1, -1))

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        """The Denoiser: exact estimates of x [B,...]. At sigma = 0 x0 is x / alpha; at alpha = 0 it is the mean."""
        s = _column(level.sigma)
        along, spread = self._along(x, level), self._spread(level)
        share = torch.where(s[..., 0] == 0, self.weights, self._log_joint(along, spread).softmax(1))
        noise = torch.einsum("bk,bke,kde->bd", share, along * torch.where(s == 0, 0.0, s / spread), self._vectors)
        x0 = (share[..., None] * self._means(along, level)).sum(1)
        return Estimate(x0.reshape(x.shape).to(x), noise.reshape(x.shape).to(x))

    def posterior(self, x: Tensor, level: Level) -> Posterior:
        """The whole distribution of x0 given x [B,...]. Raises UsageError at sigma = 0 where a covariance is singular."""
        a, s = _column(level.alpha), _column(level.sigma)
        values = s * s * self._values / self._density_spread(level)
        covariances = torch.einsum("kde,bke,kfe->bkdf", self._vectors, values.expand(len(a), -1, -1), self._vectors)
        return Posterior(self.responsibilities(x, level), self._means(self._along(x, level), level), covariances)

    def responsibilities(self, x: Tensor, level: Level = CLEAN) -> Tensor:
        """p(component | x) at the level, [B,K]. Raises UsageError at sigma = 0 where a covariance is singular."""
        return self._log_joint(self._along(x, level), self._density_spread(level)).softmax(1)

    def log_density(self, x: Tensor, level: Level = CLEAN) -> Tensor:
        """log p(x) at the level in nats, [B]. Raises UsageError at sigma = 0 where a covariance is singular."""
        return self._log_joint(self._along(x, level), self._density_spread(level)).logsumexp(1)

    def score(self, x: Tensor, level: Level) -> Tensor:
        """The gradient of log p(x) at the level, [B,...]. Raises UsageError at sigma = 0 where a covariance is singular.

        `given(...).score - score` and `measured(...).score - score` are the gradients of log p(class | x) and log p(y | x):
        the exact classifier and the exact measurement guidance.
        """
        along, spread = self._along(x, level), self._density_spread(level)
        share = self._log_joint(along, spread).softmax(1)
        return -torch.einsum("bk,bke,kde->bd", share, along / spread, self._vectors).reshape(x.shape).to(x)

    def log_classes(self, x: Tensor, level: Level, likelihood: Tensor) -> Tensor:
        """The exact noisy classifier, log p(class | x) in nats: [B,L]. likelihood: [L,K], p(class | component), whose
        columns sum to 1 (the unit matrix makes every component a class of its own)."""
        joint = self._log_joint(self._along(x, level), self._density_spread(level)).log_softmax(1)
        return (joint[:, None] + likelihood.log()).logsumexp(2)

    def given(self, likelihood: Tensor) -> Mixture:
        """The distribution of x0 given a class, by p(class | component): [K]. Raises UsageError for an impossible class."""
        weights = self.weights * likelihood
        if not float(weights.sum()) > 0:
            raise UsageError("the class is impossible: no component of the mixture has it")
        return Mixture(weights / weights.sum(), self.means, self.covariances)

    def measured(self, operator: Tensor, y: Tensor, deviation: float) -> Mixture:
        """The distribution of x0 given y = operator x0 + deviation * noise: a Kalman update of every component, and weights
        by how well each foresaw y. operator: [M,D]; y: M values. Raises UsageError where y has no density: rows of the
        operator that depend on each other, with deviation 0.
        """
        c, eye = self.covariances, torch.eye(self.means.shape[1], dtype=self.means.dtype)
        of_y = operator @ c @ operator.T + deviation**2 * torch.eye(len(operator), dtype=c.dtype)  # [K,M,M]
        values, vectors = torch.linalg.eigh(of_y)
        if bool((values[:, 0] <= 1e-14 * values[:, -1]).any()):
            raise UsageError("the measurement has rows that depend on each other; leave them out or give a deviation above 0")
        surprise = y.flatten() - self.means @ operator.T  # [K,M]
        gain = torch.linalg.solve(of_y, operator @ c).mT  # [K,D,M]
        keep = eye - gain @ operator
        covariances = keep @ c @ keep.mT + deviation**2 * gain @ gain.mT
        along = torch.einsum("km,kmn->kn", surprise, vectors)
        log_weights = self.weights.log() - 0.5 * (along.square() / values + values.log()).sum(1)
        means = self.means + torch.einsum("kdm,km->kd", gain, surprise)
        return Mixture(log_weights.softmax(0), means, (covariances + covariances.mT) / 2)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D,D] of x0."""
        mean = self.weights @ self.means
        away = self.means - mean
        return mean, torch.einsum("k,kde->de", self.weights, self.covariances + away[:, :, None] * away[:, None])

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """Independent draws of x0, [count,D]; the same on every machine."""
        generator = np.random.Generator(np.random.Philox(key=seed))
        which = torch.from_numpy(np.searchsorted(self.weights.cumsum(0).numpy()[:-1], generator.random(count), side="right"))
        z = torch.from_numpy(generator.standard_normal((count, self.means.shape[1])))
        return self.means[which] + torch.einsum("bde,be->bd", self._vectors[which], z * self._values[which].sqrt())

    def _along(self, x: Tensor, level: Level) -> Tensor:
        """x - alpha mean in the eigenbasis of every component, [B,K,D]."""
        away = x.reshape(len(x), 1, -1).to(self.means) - _column(level.alpha) * self.means
        return torch.einsum("bkd,kde->bke", away, self._vectors)

    def _spread(self, level: Level) -> Tensor:
        """The variances of x in those bases, [B or 1,K,D]."""
        return _column(level.alpha) ** 2 * self._values + _column(level.sigma) ** 2

    def _density_spread(self, level: Level) -> Tensor:
        spread = self._spread(level)
        if bool((spread == 0).any()):
            raise UsageError("a singular covariance has no density at sigma = 0")
        return spread

    def _means(self, along: Tensor, level: Level) -> Tensor:
        """E[x0 | x, component], [B,K,D]."""
        a, s = _column(level.alpha), _column(level.sigma)
        gain = torch.where(s == 0, 1 / a, a * self._values / self._spread(level))
        return self.means + torch.einsum("bke,kde->bkd", along * gain, self._vectors)

    def _log_joint(self, along: Tensor, spread: Tensor) -> Tensor:
        """log p(component, x), [B,K]."""
        return self.weights.log() - 0.5 * (along.square() / spread + spread.log() + math.log(2 * math.pi)).sum(2)


def _column(value: Scalar) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1)
