"""The log-likelihood of images under a denoiser, by the probability-flow ODE: Score-Based Generative Modeling through
Stochastic Differential Equations, Song et al. 2020, arXiv 2011.13456, section 4.3 and appendix D.2.

In flow coordinates, y = x / (alpha + sigma) over u, dy/du = v = noise - x0, and the density changes by its divergence:
log p(y_low) = log p(y_high) + int div v du (instantaneous change of variables, Neural Ordinary Differential Equations,
Chen et al. 2018, arXiv 1806.07366). At alpha = 0 the upper end is N(0, I) exactly; on a path that ends before it,
N(0, alpha^2 + sigma^2) of unit variance data is what the paper takes too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.runge_kutta import integrate


def log_likelihood(
    denoise: Denoiser,
    x: Tensor,
    low: Level,
    high: Level,
    tolerance: float = 1e-5,
    probes: int | None = None,
    seed: int = 0,
) -> Tensor:
    """log p(x) in nats, [B], of images x [B,...] at the level `low`, from the ODE up to the level `high`.

    denoise: differentiable by x. low: the least noise that the denoiser knows (for a network the path's first level; x is then
    an image with that much noise on it). high: alpha = 0 where the network can be asked there, else the path's last level.
    probes: None is the exact divergence, one backward pass for each value of an image; a number is Hutchinson's estimate with
    as many random signs, the same along the path (unbiased; its spread falls with their root). Bits per value: -log p / (D
    log 2). Raises UsageError where low is not below high, or probes is below 1.
    """
    start, end = float(low.u), float(high.u)
    if not 0 <= start < end <= 1 or (probes is not None and probes < 1):
        raise UsageError("log_likelihood needs low below high, and probes of 1 or more (None: exact)")
    d, batch = math.prod(x.shape[1:]), len(x)
    signs = None if probes is None else _signs(probes, x, seed)

    def slope(u: float, state: Tensor) -> Tensor:
        with torch.enable_grad():
            y = state[:, :d].reshape(x.shape).detach().requires_grad_()
            estimate = denoise(y, Level(1 - u, u))
            v = (estimate.noise - estimate.x0).reshape(batch, d)
            return torch.cat([v.detach(), _divergence(v, y, signs)[:, None]], dim=1)

    scale = float(low.alpha + low.sigma)
    state = torch.cat([(x / scale).reshape(batch, d), x.new_zeros(batch, 1)], dim=1)
    state = integrate(slope, state, start, end, tolerance)
    variance = ((high.alpha**2 + high.sigma**2) / (high.alpha + high.sigma) ** 2) if high.alpha else 1.0
    prior = -0.5 * (state[:, :d].square().sum(1) / variance + d * math.log(2 * math.pi * variance))
    return prior + state[:, d] - d * math.log(scale)


def _signs(probes: int, x: Tensor, seed: int) -> Tensor:
    """[P,D] of -1 and 1, the same for every image and on every machine."""
    bits = np.random.Generator(np.random.Philox(key=seed)).integers(0, 2, (probes, math.prod(x.shape[1:])))
    return torch.from_numpy(bits * 2 - 1).to(x)


def _divergence(v: Tensor, y: Tensor, signs: Tensor | None) -> Tensor:
    """tr dv/dy of every image, [B]; with signs e, the mean of e' dv/dy e. Images of a batch do not touch each other."""
    rows = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) if signs is None else signs
    total = v.new_zeros(len(v))
    for row in rows:
        (back,) = torch.autograd.grad((v @ row).sum(), y, retain_graph=True)
        total = total + back.reshape(v.shape) @ row
    return total / (1 if signs is None else len(rows))
