"""The Wasserstein-2 distance, in the units of the data: exact between Gaussians and between samples, and sliced.

W2^2(p, q) is the least mean of |a - b|^2 over all couplings of a ~ p and b ~ q.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.errors import UsageError

Moments = tuple[Tensor, Tensor]


def gaussian_w2(first: Moments, second: Moments) -> float:
    """W2 between Gaussians given as (mean [D], covariance [D,D]), singular ones too; exact, to about 1e-8 near 0.

    W2^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2). The Frechet Distance between Multivariate Normal
    Distributions, Dowson and Landau 1982, J. Multivariate Analysis 12(3).
    """
    (mean, covariance), (other, second_covariance) = first, second
    half = _root(second_covariance)
    cross = torch.linalg.eigvalsh(half @ covariance @ half).clamp(min=0).sqrt().sum()
    square = (mean - other).square().sum() + covariance.trace() + second_covariance.trace() - 2 * cross
    return float(square.clamp(min=0).sqrt())


class Closeness(NamedTuple):
    """How far a Gaussian is from the right one: W2, the mean's error over the mean's length, the ratio of total variances."""

    w2: float
    mean_error: float
    trace_ratio: float


def closeness(found: Moments, right: Moments) -> Closeness:
    """The three columns by which the methods are judged. The mean's error is inf or nan where the right mean is 0."""
    error = (found[0] - right[0]).norm() / right[0].norm()
    return Closeness(gaussian_w2(found, right), float(error), float(found[1].trace() / right[1].trace()))


def sample_w2(a: Tensor, b: Tensor) -> float:
    """W2 between two samples of N images each, [N,...]: exact, by the best one-to-one assignment. O(N^3), for N to 1000.

    Its mean is above the W2 of the distributions, by about N^(-1/D) of their size. Raises UsageError for unequal samples.
    """
    if a.shape != b.shape:
        raise UsageError(f"sample_w2 takes two samples of one shape, got {list(a.shape)} and {list(b.shape)}")
    x, y = _flat(a), _flat(b)
    cost = (x[:, None] - y).square().sum(2).numpy()
    return float(cost[np.arange(len(cost)), _assign(cost)].mean() ** 0.5)


def sliced_w2(a: Tensor, b: Tensor, bases: int = 32, seed: int = 0) -> float:
    """The root of the mean W2^2 between the projections of two samples [N,...] and [M,...] onto a line, over all lines.

    Sliced and Radon Wasserstein Barycenters of Measures, Bonneel et al. 2015, J. Math. Imaging and Vision 51, section 2. The
    lines are the axes of `bases` random orthonormal bases (Orthogonal Estimation of Wasserstein Distances, Rowland et al.
    2019, arXiv 1903.03784): a shift by v is told exactly, as |v| / sqrt(D). In one dimension it is W2 itself.
    """
    x, y = _flat(a), _flat(b)
    if x.shape[1] != y.shape[1]:
        raise UsageError(f"sliced_w2 takes images of one size, got {x.shape[1]} and {y.shape[1]} values")
    random = np.random.Generator(np.random.Philox(key=seed)).standard_normal((bases, x.shape[1], x.shape[1]))
    axes = torch.linalg.qr(torch.from_numpy(random))[0]
    return float(torch.stack([_line_w2_squared(x @ axis, y @ axis) for axis in axes]).mean().sqrt())


def _line_w2_squared(x: Tensor, y: Tensor) -> Tensor:
    """W2^2 of every column: the integral of the squared difference of the quantile functions. [N,D], [M,D] -> [D]."""
    x, y = x.sort(dim=0).values, y.sort(dim=0).values
    n, m = len(x), len(y)
    if n == m:
        return (x - y).square().mean(0)
    # The quantile functions are constant between the whole numbers / (n m) that are multiples of m or of n.
    ends = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]))
    widths = ends.diff().double() / (n * m)
    return widths @ (x[ends[:-1] // m] - y[ends[:-1] // n]).square()


def _assign(cost: np.ndarray) -> np.ndarray:
    """The column of every row in the cheapest assignment, [N,N] -> [N].

    Shortest augmenting paths with potentials: On Implementing 2D Rectangular Assignment Algorithms, Crouse 2016, IEEE Trans.
    Aerospace and Electronic Systems 52(4).
    """
    n = len(cost)
    rows, columns = np.zeros(n), np.zeros(n)  # the potentials
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        shortest, before, done = np.full(n, np.inf), np.full(n, -1), np.zeros(n, bool)
        row, length = start, 0.0
        while row >= 0:
            way = length + cost[row] - rows[row] - columns
            nearer = ~done & (way < shortest)
            shortest[nearer], before[nearer] = way[nearer], row
            column = int(np.where(done, np.inf, shortest).argmin())
            length, row = float(shortest[column]), int(row_of[column])
            done[column] = True
        rows[row_of[done & (row_of >= 0)]] += length - shortest[done & (row_of >= 0)]
        rows[start] += length
        columns[done] -= length - shortest[done]
        while column >= 0:  # swap along the path, back to where it started
            row = int(before[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
    return column_of


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _flat(sample: Tensor) -> Tensor:
    return sample.detach().cpu().double().reshape(len(sample), -1)
