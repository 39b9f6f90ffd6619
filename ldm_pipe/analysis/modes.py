"""Which modes a sample visits, and how often: moments alone cannot tell a lost mode from a moved one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError


def mode_fractions(x: Tensor, centres: Tensor, radius: float = math.inf) -> tuple[Tensor, float]:
    """The share of images [N,...] nearest to each centre [K,...], and the share that lies further than `radius` (in units of
    the data, Euclidean) from all of them: ([K], lost), together 1.

    For modes far apart against their width the shares are the weights of the mixture, to sqrt(w (1 - w) / N). Where they
    overlap, the mean of `Mixture.responsibilities` has the weights as its mean. Raises UsageError without images.
    """
    if len(x) == 0:
        raise UsageError("mode_fractions takes at least one image")
    distance, nearest = torch.cdist(x.reshape(len(x), -1).double(), centres.reshape(len(centres), -1).double()).min(1)
    kept = nearest[distance <= radius]
    return torch.bincount(kept, minlength=len(centres)).double() / len(x), 1 - len(kept) / len(x)
