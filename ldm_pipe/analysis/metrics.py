"""How far a set of pictures is from another, and from its captions, on features of any extractor; in float64, on the CPU.

A number means nothing without its extractor: `ldm_pipe.analysis.Extractor` has a name and a digest to print beside it. "FID" is
the Frechet distance on one network's features only; on others it is FD(extractor).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError


def frechet(real: Tensor, made: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [N,D] and [M,D].

    GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium, Heusel et al. 2017, arXiv 1706.08500,
    eq. 6. Biased upwards in small sets. Raises UsageError where a set holds no more rows than features: its covariance is
    singular then, and the number an artefact.
    """
    real, made = _pair(real, made)
    for features in (real, made):
        if len(features) <= features.shape[1]:
            raise UsageError(f"a Frechet distance of {features.shape[1]} features takes more pictures than {len(features)}")
    first, second = _covariance(real), _covariance(made)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    traces = first.trace() + second.trace()
    return float((real.mean(0) - made.mean(0)).square().sum() + traces - 2 * cross)


def kernel_distance(real: Tensor, made: Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel (x y / D + 1)^3, without bias: it may be below zero.

    Demystifying MMD GANs, Binkowski et al. 2018, arXiv 1801.01401, eq. 4 and section 4. For small sets better than `frechet`.
    """
    real, made = _pair(real, made)
    n, m = len(real), len(made)
    if min(n, m) < 2:
        raise UsageError("a kernel distance takes two pictures or more of each set")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    own, other = kernel(real, real), kernel(made, made)
    within = (own.sum() - own.trace()) / (n * (n - 1)) + (other.sum() - other.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(real, made).mean())


class Coverage(NamedTuple):
    """Shares in 0..1 (density may exceed 1)."""

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(real: Tensor, made: Tensor, k: int = 3) -> Coverage:
    """How many made pictures lie among the real ones, and the other way round, by balls that reach to the k-th neighbour.

    Improved Precision and Recall Metric for Assessing Generative Models, Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-2;
    Reliable Fidelity and Diversity Metrics for Generative Models, Naeem et al. 2020, arXiv 2002.09797, eq. 3-4.
    """
    real, made = _pair(real, made)
    if not 1 <= k < min(len(real), len(made)):
        raise UsageError(f"k is {k}; it takes 1 to one less than the pictures of a set")
    across = torch.cdist(real, made)  # [N,M]
    inside_real = across <= _reach(real, k)[:, None]
    inside_made = across <= _reach(made, k)[None]
    return Coverage(
        float(inside_real.any(0).double().mean()),
        float(inside_made.any(1).double().mean()),
        float(inside_real.double().sum(0).mean() / k),
        float(inside_real.any(1).double().mean()),
    )


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean of 100 max(cosine, 0) of image features [N,D] and those of their captions [N,D].

    CLIPScore, Hessel et al. 2021, arXiv 2104.08718, eq. 1, with the weight 100 that is usual for generated pictures.
    """
    images, texts = _pair(images, texts)
    if len(images) != len(texts):
        raise UsageError(f"{len(images)} pictures and {len(texts)} captions do not go together")
    return float(torch.cosine_similarity(images, texts).clamp(min=0).mean() * 100)


def r_precision(images: Tensor, texts: Tensor) -> float:
    """Share of pictures whose own caption is closest among all different ones: features [N,D] each; ties count as misses.

    AttnGAN, Xu et al. 2018, arXiv 1711.10485, section 4.1.
    """
    images, texts = _pair(images, texts)
    cosine = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    own = cosine.diagonal()[:, None]
    same = torch.cdist(texts, texts) == 0
    return float(((cosine < own) | same).all(1).double().mean())


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UsageError(f"features are [N,D] with one D, not {list(a.shape)} and {list(b.shape)}")
    a, b = a.double().cpu(), b.double().cpu()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UsageError("features that are not finite cannot be compared")
    return a, b


def _covariance(features: Tensor) -> Tensor:
    return torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _reach(features: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th neighbour, itself not counted."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values
