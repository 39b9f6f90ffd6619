"""The reference problem: eight correlated values, four measured, on which every restoration method has a known bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """x0 ~ N(mean [D], covariance [D,D]) of which y = operator x0 + deviation * noise is known. operator: [M,D], y: [M]."""

    mean: Tensor
    covariance: Tensor
    operator: Tensor
    y: Tensor
    deviation: float


def reference_problem(operator: Literal["pool2", "mask4"], deviation: float) -> Problem:
    """Mean 0, C_ij = 0.9^|i - j|, i, j = 1..8, and y = A x0 of x0_k = sin(k), with no noise drawn, all float64.

    operator: "pool2" is the mean of adjacent pairs (super-resolution), "mask4" the first four values (inpainting). deviation:
    that of the noise that the methods assume; 0.1 and 0 are the usual two. The schedule that goes with it is
    `levels.leading(VP.linear(), steps, offset=0)`.
    """
    index = torch.arange(1, 9, dtype=torch.float64)
    eye = torch.eye(8, dtype=torch.float64)
    a = {"pool2": (eye[::2] + eye[1::2]) / 2, "mask4": eye[:4]}[operator]
    return Problem(torch.zeros_like(index), 0.9 ** (index[:, None] - index).abs(), a, a @ index.sin(), deviation)
