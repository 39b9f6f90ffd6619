"""Denoising Diffusion Autoencoders are Unified Self-supervised Learners, Xiang et al. 2023, arXiv 2303.09769, section 3.

What a network makes of a noised picture in its inner layers, averaged over the image, is a vector that a linear head reads.
The head is ridge regression to the classes, its weight decay by generalised cross-validation (Golub, Heath and Wahba 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import Rows
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.patch import feature_tap

DECAYS = torch.logspace(-3, 7, 41, dtype=torch.float64)


@torch.no_grad()
def features(
    denoise: Denoiser, network: nn.Module, x0: Tensor, noise: Tensor, level: Level, layers: Sequence[str]
) -> dict[str, Tensor]:
    """[B,C] for each layer: its output at pictures x0 [B,C,H,W] mixed with noise to a level, averaged over all positions.

    layers: modules of `network` by name, or the end of one, which give [B,C,h,w] or [B,L,C]; `denoise` must ask that network
    about every picture once. Raises UsageError where a name fits no layer, or its layer gives something else.
    """
    found: dict[str, Tensor] = {}

    def read(name: str, rows: Rows, out: Tensor) -> None:
        if not isinstance(out, Tensor) or out.ndim not in (3, 4) or len(out) != len(x0):
            raise UsageError(f"layer {name!r} gives no features [B,C,h,w] or [B,L,C] for each of the {len(x0)} pictures")
        found[name] = out.double().mean((2, 3) if out.ndim == 4 else 1)

    with feature_tap(network, {name: partial(read, name) for name in layers}):
        denoise(level.mix(x0, noise), level)
    return found


@dataclass(frozen=True, eq=False)
class LinearHead:
    """x [N,D] -> scores [N,K]. mean, scale: [D] of the features it was fitted to; weight: [D,K]; bias: [K]; decay: chosen."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    decay: float

    @classmethod
    def fit(cls, x: Tensor, labels: Tensor, decays: Tensor = DECAYS) -> LinearHead:
        """The head of features x [N,D], each standardised, and labels [N] from 0 to K - 1. decays: to choose from."""
        mean, scale = x.double().mean(0), x.double().std(0).clamp_min(1e-12)
        wanted = F.one_hot(labels).double()
        bias = wanted.mean(0)
        u, s, v = torch.linalg.svd((x.double() - mean) / scale, full_matrices=False)
        seen = u.T @ (wanted - bias)  # [R,K]
        unseen = (wanted - bias).square().sum() - seen.square().sum()
        shrink = s.square() / (s.square() + decays.double()[:, None])  # [decays,R]
        error = ((1 - shrink).square() @ seen.square().sum(1)) + unseen
        left = len(x) - 1 - shrink.sum(1)  # degrees of freedom; one is the bias
        best = int((error / left.clamp_min(1e-9).square()).argmin())
        weight = v.T @ ((shrink[best] / s.clamp_min(1e-300))[:, None] * seen)
        return cls(mean, scale, weight, bias, float(decays[best]))

    def __call__(self, x: Tensor) -> Tensor:
        """The scores; the class is the largest."""
        return ((x.double() - self.mean) / self.scale) @ self.weight + self.bias

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of pictures, 0 to 1, whose class is found."""
        return float((self(x).argmax(1) == labels).double().mean())
