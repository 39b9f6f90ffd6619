"""W2 against what optimal transport says of it: Brenier's map, brute force over all pairings, scipy, exact symmetries."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ldm_pipe import Gaussian, UsageError
from ldm_pipe.analysis import closeness, gaussian_w2, sample_w2, sliced_w2

Normal = Callable[..., Tensor]


@pytest.fixture
def normal() -> Normal:
    """normal(*shape): standard normal values, the same in every run of a test."""
    random = np.random.Generator(np.random.Philox(key=8))
    return lambda *shape: torch.from_numpy(random.standard_normal(shape))


def moments(normal: Normal, dim: int) -> tuple[Tensor, Tensor]:
    root = normal(dim, dim)
    return normal(dim), root @ root.T


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_gaussians_by_breniers_map(normal: Normal, dim: int) -> None:
    """The symmetric positive T with T S1 T = S2 is the optimal map, so that W2^2 = E|x - T x|^2 (Brenier 1991)."""
    (m, s), (n, r) = moments(normal, dim), moments(normal, dim)
    root = torch.from_numpy(np.real(sqrtm(s.numpy())).reshape(dim, dim))
    t = root.inverse() @ torch.from_numpy(np.real(sqrtm((root @ r @ root).numpy())).reshape(dim, dim)) @ root.inverse()
    assert torch.allclose(t @ s @ t, r, atol=1e-8)
    away = torch.eye(dim) - t
    cost = (m - n).square().sum() + (away @ s @ away.T).trace()
    assert gaussian_w2((m, s), (n, r)) == pytest.approx(float(cost) ** 0.5, rel=1e-8)
    assert gaussian_w2((n, r), (m, s)) == pytest.approx(float(cost) ** 0.5, rel=1e-8)


def test_gaussians_that_are_alike_or_flat(normal: Normal) -> None:
    """No distance to itself; on one eigenbasis the deviations' distance; points and planes have one too."""
    m, s = moments(normal, 4)
    assert gaussian_w2((m, s), (m, s)) < 1e-6
    values, vectors = torch.linalg.eigh(s)
    other = (vectors * values.flip(0)) @ vectors.T
    expected = float((values.sqrt() - values.flip(0).sqrt()).square().sum()) ** 0.5
    assert gaussian_w2((m, s), (m, other)) == pytest.approx(expected, rel=1e-10)
    assert gaussian_w2((m, s), (m, torch.zeros_like(s))) == pytest.approx(float(s.trace()) ** 0.5, rel=1e-10)
    assert gaussian_w2((m, 0 * s), (m + 1, 0 * s)) == pytest.approx(2.0)


def test_closeness(normal: Normal) -> None:
    m, s = moments(normal, 4)
    found = closeness((1.1 * m, 4 * s), (m, s))
    expected = (0.01 * m.square().sum() + s.trace()) ** 0.5  # the deviations 2 d and d
    assert found == pytest.approx((float(expected), 0.1, 4.0), rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_samples_by_trying_every_pairing(normal: Normal, count: int) -> None:
    a, b = normal(count, 1, 3), normal(count, 1, 3)
    costs = [float((a - b[list(order)]).square().sum()) / count for order in permutations(range(count))]
    assert sample_w2(a, b) == pytest.approx(min(costs) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("case", ["apart", "ties", "equal"])
def test_samples_by_scipys_assignment(normal: Normal, case: str) -> None:
    a, b = normal(90, 2), normal(90, 2) + 0.5
    if case != "apart":
        a, b = a.round(), b.round()
    b = a.flip(0) if case == "equal" else b
    cost = torch.cdist(a, b).square().numpy()
    assert sample_w2(a, b) == pytest.approx(cost[linear_sum_assignment(cost)].mean() ** 0.5, rel=1e-9, abs=1e-12)


def test_one_dimension_is_sorting(normal: Normal) -> None:
    """There the sliced distance is the distance, and the assignment agrees with the quantiles."""
    a, b = normal(60, 1), 2 * normal(60, 1) + 1
    assert sliced_w2(a, b) == pytest.approx(sample_w2(a, b), rel=1e-10)


def test_sliced_of_unequal_counts_is_that_of_repeated_samples(normal: Normal) -> None:
    """Each sample repeated to the common count 12 has the same distribution; and a point against a sample is plain."""
    a, b = normal(4, 3), normal(6, 3)
    same = sliced_w2(a.repeat_interleave(3, 0), b.repeat_interleave(2, 0))
    assert sliced_w2(a, b) == pytest.approx(same, rel=1e-10)
    assert sliced_w2(b, a) == pytest.approx(same, rel=1e-10)
    assert sliced_w2(a, a[:1]) == pytest.approx(float((a - a[0]).square().sum(1).mean() / 3) ** 0.5, rel=1e-10)


def test_sliced_shifts_and_scales_are_exact(normal: Normal) -> None:
    """A shift moves every line's sample by its share, |v|^2 / D in the mean over a basis; scaling about 0 keeps all orders."""
    a, shift = normal(50, 2, 2), normal(2, 2)
    assert sliced_w2(a, a + shift, bases=1) == pytest.approx(float(shift.square().mean()) ** 0.5, rel=1e-10)
    assert sliced_w2(a, 3 * a, bases=1) == pytest.approx(2 * float(a.square().mean()) ** 0.5, rel=1e-10)
    assert sliced_w2(a, a[torch.randperm(50)]) < 1e-12


def test_sliced_is_the_mean_over_all_lines(normal: Normal) -> None:
    """In two dimensions the lines are angles: against a fine sum over them, with what 256 random bases leave of error."""
    a, b = normal(40, 2), normal(40, 2) @ torch.tensor([[2.0, 0.5], [0.0, 0.3]]).double()
    angles = torch.arange(720, dtype=torch.float64) * torch.pi / 720
    axes = torch.stack([angles.cos(), angles.sin()])
    squares = ((a @ axes).sort(0).values - (b @ axes).sort(0).values).square().mean(0)
    error = 5 * float(squares.std()) / (256**0.5 * 2 * float(squares.mean()) ** 0.5)
    assert sliced_w2(a, b, bases=256) == pytest.approx(float(squares.mean()) ** 0.5, abs=error)
    assert sliced_w2(a, b, seed=1) != sliced_w2(a, b)
    assert sliced_w2(a, b, seed=1) == sliced_w2(a, b, seed=1)


def test_a_sample_comes_near_its_own_distribution() -> None:
    """Sliced, two draws of one Gaussian are apart by no more than 1 / sqrt(N) of its size, and one of another much more."""
    c = torch.diag(torch.tensor([1.0, 0.5, 0.1]).double())
    one, other = Gaussian(torch.zeros(3).double(), c), Gaussian(torch.zeros(3).double(), 4 * c)
    near = sliced_w2(one.draw(4000, seed=1), one.draw(4000, seed=2))
    far = sliced_w2(one.draw(4000, seed=1), other.draw(4000, seed=2))
    assert near < 3 * float(c.trace() / 4000) ** 0.5
    assert far == pytest.approx(float(c.trace() / 3) ** 0.5, rel=0.05)  # each line sees deviation d against 2 d


def test_samples_that_cannot_be_compared_are_refused(normal: Normal) -> None:
    with pytest.raises(UsageError, match="one shape"):
        sample_w2(normal(3, 2), normal(4, 2))
    with pytest.raises(UsageError, match="one size"):
        sliced_w2(normal(3, 2), normal(3, 3))
