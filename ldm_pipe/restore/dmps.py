"""Diffusion Model Based Posterior Sampling for Noisy Linear Inverse Problems, Meng and Kabashima 2022, arXiv 2211.12343.

Algorithm 1 with alpha_t, not its running product, in lines 3 and 5; the score of the data is taken at x_t, as the algorithm has
it (the official code takes it at the new sample). No gradient through the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.restore.operator import Measurement, shifted


@dataclass(frozen=True)
class DMPS:
    """The score moves by that of y under a flat prior: A' (deviation^2 + (sigma / alpha)^2 A A')^-1 (y - A x / alpha) / alpha.

    A Guide for ancestral sampling, 1000 steps. weight: the paper's lambda; 0 changes nothing. Raises UsageError at alpha = 0,
    where x / alpha is not defined.
    """

    measurement: Measurement
    weight: float = 1.75

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the moved score."""
        if self.weight == 0:
            return denoise
        return lambda x, level: shifted(denoise(x, level), self.weight * self._score(x, level), x, level)

    def _score(self, x: Tensor, level: Level) -> Tensor:
        if level.alpha == 0:
            raise UsageError("dmps cannot start at alpha = 0 (pure noise); choose a path or a spacing that starts below it")
        a = self.measurement.linear.spectrum(tuple(x.shape[1:]), x)
        away = a.ut(self.measurement.y) - a.s * a.vt(x / level.alpha)
        spread = self.measurement.deviation**2 + (level.ratio * a.safe) ** 2
        return a.v(torch.where(a.known, a.s * away / spread, 0.0)) / level.alpha
