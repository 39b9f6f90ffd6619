"""The learned variance's own term: the variational bound of one step, with the mean held still.

Improved Denoising Diffusion Probabilistic Models, Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15 and 16.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Path


def table_of(path: Path) -> Tensor:
    """The cumulative products abar[0..T-1] of a table path, float64. Raises UsageError on the others."""
    table = getattr(path, "table", None)
    if table is None:
        raise UsageError("objective: hybrid learns the variance of a table's steps; this path has no table")
    return torch.tensor(table, dtype=torch.float64)


def bound(table: Tensor, time: Tensor, x: Tensor, x0: Tensor, guess: Tensor, part: Tensor) -> Tensor:
    """KL(q(x_t-1 | x_t, x0) || p(x_t-1 | x_t)) in bits per value, [B]; at t = 0 the negative log density of x0.

    time: [B] whole indices of the table. x, x0, guess (the network's x0; no gradient goes into it): [B,C,H,W], part: the
    variance's raw half in -1..1, which interpolates the log of the two bounds. The smaller bound is 0 at t = 0: there that of
    t = 1 is taken, as in the authors' code.
    """
    t = time.long()
    large, small, of_x0, of_x = (_column(s[t.cpu()], x) for s in _steps(table))
    share = (part + 1) / 2
    log_var = share * large.log() + (1 - share) * small.log()
    mean, goal = of_x0 * guess.detach() + of_x * x, of_x0 * x0 + of_x * x
    error = (goal - mean).square() * torch.exp(-log_var)
    kl = 0.5 * (log_var - small.log() + small / log_var.exp() - 1 + error)
    density = 0.5 * (math.log(2 * math.pi) + log_var + error)  # at t = 0 of_x0 = 1 and of_x = 0: the mean is x0's own
    first = (t == 0).to(x)[:, None, None, None]
    return (first * density + (1 - first) * kl).mean(dim=(1, 2, 3)) / math.log(2)


def _steps(table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta, beta-tilde and the posterior's coefficients of x0 and x_t, each [T] (Ho et al. 2020, eq. 7)."""
    before = torch.cat([table.new_ones(1), table[:-1]])
    beta = 1 - table / before
    tilde = (1 - before) / (1 - table) * beta
    tilde = torch.cat([tilde[1:2], tilde[1:]])
    return beta, tilde, before.sqrt() * beta / (1 - table), (1 - beta).sqrt() * (1 - before) / (1 - table)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like)[:, None, None, None]
