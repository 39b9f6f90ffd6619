"""A learned weight: the loss of every level divided by how large it usually is there.

Analyzing and Improving the Training Dynamics of Diffusion Models, Karras et al. 2023, arXiv 2312.02696, eq. 21 and 22.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LogVariance(nn.Module):
    """u(level), one linear layer on Fourier features of ln(sigma / alpha) / 4; zero at first. Trained along, never exported.

    The loss L / e^u + u is least where e^u is the expected L of the level, so that every level weighs alike.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        at = torch.linspace(0, 1, features, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi * torch.erfinv(1.9 * at - 0.95) * math.sqrt(2)).float())
        self.register_buffer("phases", (2 * math.pi * (at * 7.389 % 1)).float())
        self.head = nn.Linear(features, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def of(self, snr: Tensor) -> Tensor:
        """u of levels of these signal-to-noise ratios: [B] -> [B]."""
        clock = -snr.clamp(1e-12, 1e12).log() / 8
        return self.head(torch.cos(clock[:, None] * self.frequencies + self.phases) * math.sqrt(2))[:, 0]

    def forward(self, loss: Tensor, snr: Tensor) -> Tensor:
        """L / e^u + u, [B]."""
        u = self.of(snr)
        return loss / u.exp() + u
