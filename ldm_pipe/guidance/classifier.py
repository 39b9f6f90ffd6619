"""Classifier guidance: Diffusion Models Beat GANs on Image Synthesis, Dhariwal and Nichol 2021, arXiv 2105.05233, section 4.2.

Several classifiers, each for its own range of noise: Towards Practical Plug-and-Play Diffusion Models, Go et al. 2022, arXiv
2212.05973 (PPAP), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import CLEAN, Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.restore.operator import shifted, through


class LogProb(Protocol):
    """Any differentiable log p(y | x) in nats, up to a constant: x [B,C,H,W] at a level -> [B]."""

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """One number for every sample."""


@dataclass(frozen=True)
class Classifier:
    """A Guide: the score moves by scale * gradient of log p(y | x): at scale 1, with an exact p, to the conditional score.

    clean: log_prob knows clean images only; it is asked about x0(x), and the gradient goes through the network. At alpha = 0,
    where x says nothing of x0, the estimate stays as it is.
    """

    log_prob: LogProb
    scale: float = 1.0
    clean: bool = False

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the moved score; itself at scale 0. Works inside no_grad."""
        if self.scale == 0:
            return denoise

        def move(x: Tensor, level: Level) -> Estimate:
            if self.clean:
                known, gradient = through(denoise, x, level, lambda x0: self.log_prob(x0, CLEAN))
                return shifted(known(x, level), self.scale * gradient, x, level)
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                gradient = torch.autograd.grad(self.log_prob(leaf, level).sum(), leaf)[0]
            return shifted(denoise(x, level), self.scale * gradient, x, level)

        return move


@dataclass(frozen=True)
class Experts:
    """A Guide: classifier guidance by one of several experts, each for an equal range of the noise u.

    experts: from the least noise to the most; expert k of N sees k / N <= u < (k + 1) / N, the last also u = 1.
    """

    experts: tuple[LogProb, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.experts:
            raise UsageError("experts: it takes one expert or several")

    def expert(self, level: Level) -> LogProb:
        """The one whose range the level lies in."""
        count = len(self.experts)
        return self.experts[min(count - 1, int(count * float(level.u)))]

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the score that the level's expert moves."""
        return Classifier(lambda x, level: self.expert(level)(x, level), self.scale)(denoise)
