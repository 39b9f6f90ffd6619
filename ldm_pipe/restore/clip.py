"""Restoring what was overexposed: A is a gain and a clamp."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.restore.operator import Operator


@dataclass(frozen=True)
class Clip(Operator):
    """Brighter by `gain`, then cut to -1..1: [B,C,H,W] -> the same.

    The high dynamic range problem of A Variational Perspective on Solving Inverse Problems with Diffusion Models, Mardani et
    al. 2023, arXiv 2305.04391, section 5.3.
    """

    gain: float = 2.0

    def __call__(self, x: Tensor) -> Tensor:
        """clamp(gain x, -1, 1)."""
        return (self.gain * x).clamp(-1, 1)
