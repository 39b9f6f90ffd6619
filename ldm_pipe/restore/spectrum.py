"""Singular value decompositions as functions, so that no matrix of the size of an image is ever formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]
LEAST = 1e-3  # singular values below it are taken for zero: their inverse would blow up rounding and noise


class Spectrum(NamedTuple):
    """A = U diag(s) V'. s: singular values, broadcastable to the coefficients V' x; those below LEAST are 0.

    vt and v are orthogonal and each other's inverse; u takes coefficients to measurements, ut back. What ut says where s is
    0 means nothing.
    """

    s: Tensor
    u: Map
    ut: Map
    v: Map
    vt: Map

    @property
    def known(self) -> Tensor:
        """Where s is not 0."""
        return self.s > 0

    def measured(self, y: Tensor) -> Tensor:
        """The coefficients of A+ y: U' y / s, zero where s is 0."""
        return torch.where(self.known, self.ut(y) / self.safe, 0.0)

    @property
    def safe(self) -> Tensor:
        """s with 1 for 0, to divide by (`where` alone would leave nan in gradients)."""
        return torch.where(self.known, self.s, 1.0)


def householder(weights: Tensor) -> Tensor:
    """An orthogonal matrix [n,n] whose first column is weights [n] / |weights|."""
    w = weights / weights.norm()
    v = w.clone()
    v[0] += 1 if w[0] >= 0 else -1  # the sign that does not cancel
    matrix = torch.eye(len(w), dtype=w.dtype, device=w.device) - 2 * torch.outer(v, v) / v.square().sum()
    return torch.cat([w[:, None], matrix[:, 1:]], dim=1)


def cut(s: Tensor) -> Tensor:
    """Singular values with those below LEAST set to 0."""
    return torch.where(s < LEAST, 0.0, s)


def blocks(x: Tensor, side: int) -> Tensor:
    """Pictures cut into squares: [B,C,H,W] -> [B,C,H/side,W/side,side,side]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // side, side, w // side, side).transpose(-3, -2)


def unblocks(squares: Tensor) -> Tensor:
    """The pictures of `blocks` again."""
    b, c, h, w, side, _ = squares.shape
    return squares.transpose(-3, -2).reshape(b, c, h * side, w * side)


class Axis(NamedTuple):
    """u diag(s) vt of a matrix [m,n], m <= n: u [m,m], s [n] with zeros after the m-th, vt [n,n], float64 on the CPU."""

    u: Tensor
    s: Tensor
    vt: Tensor


def axis(matrix: Tensor) -> Axis:
    """The decomposition of a matrix [m,n], m <= n."""
    u, s, vt = torch.linalg.svd(matrix)
    return Axis(u, F.pad(s, (0, len(vt) - len(s))), vt)


def separable(rows: Axis, columns: Axis, like: Tensor) -> Spectrum:
    """x -> R x C' for images [B,C,H,W], R and C the matrices of the axes; coefficients [B,C,H,W]."""
    (ur, _, vr), (uc, _, vc) = ([t.to(like) for t in side] for side in (rows, columns))
    h, w = len(ur), len(uc)
    return Spectrum(
        cut(torch.outer(rows.s, columns.s)).to(like),
        lambda c: ur @ c[..., :h, :w] @ uc.T,
        lambda y: F.pad(ur.T @ y @ uc, (0, len(vc) - w, 0, len(vr) - h)),
        lambda c: vr.T @ c @ vc,
        lambda x: vr @ x @ vc.T,
    )
