"""The denoising objective of any model: squared error against its prediction's target at a random level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.level import Level
from ldm_pipe.model import Model


class Levels(Protocol):
    """A distribution of levels over a path."""

    def __call__(self, normal: Tensor) -> Level:
        """Levels for standard normal draws [B] -> ([B,1,1,1], [B,1,1,1])."""


@dataclass(frozen=True)
class LogitNormal:
    """u = sigmoid(mean + deviation * normal) on the flow path.

    Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al. 2024, arXiv 2403.03206, eq. 19.
    """

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, normal: Tensor) -> Level:
        """Levels (1 - u, u)."""
        u = torch.sigmoid(self.mean + self.deviation * normal)[:, None, None, None]
        return Level(1 - u, u)


def denoising_loss(model: Model, x0: Tensor, noise: Tensor, level: Level, cond: Cond) -> Tensor:
    """Squared error of the raw output against the target, per sample: x0, noise [B,C,H,W] -> [B]."""
    _, out, own = model.raw(level.mix(x0, noise), level, cond)
    target = model.prediction.target(x0 / model.path.data_std, noise, own)
    return (out.float() - target).square().mean(dim=(1, 2, 3))
