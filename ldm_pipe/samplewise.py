"""Inner products and norms of every sample of a batch, on its own: an image does not depend on the others of its batch."""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product over all axes but the first, [B,1,...], of the dtype given."""
    return (a * b).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))


def norm(a: Tensor) -> Tensor:
    """The Euclidean norm over all axes but the first, [B,1,...]."""
    return dot(a, a).sqrt()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between two tensors over all axes but the first, [B,1,...]; computed in float64, as it is asked near 1."""
    a, b = a.double(), b.double()
    return dot(a, b) / (norm(a) * norm(b))


def share(a: Tensor, b: Tensor) -> Tensor:
    """How much of b lies in a, <a, b> / <b, b>, [B,1,...]; 0 where b is 0."""
    square = dot(b, b)
    return torch.where(square == 0, 0.0, dot(a, b) / square.where(square != 0, 1.0))
