"""The diffusion classifier agrees with Bayes on classes whose denoisers are known, and spends what its stages say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm_pipe import VP, Mixture, Noise, UsageError, levels
from ldm_pipe.analysis.classifier import _spread, classify
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser

MEANS = torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ONE = torch.ones(1, dtype=torch.float64)
CLASSES: dict[str, Denoiser] = {f"c{k}": Mixture.isotropic(ONE, MEANS[k : k + 1], 0.3) for k in range(6)}
LEVELS = levels.trailing(VP.scaled_linear(), 40)[:-1]


def samples(count: int) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(1)
    labels = [k % 6 for k in range(count)]
    noise = torch.randn(count, 16, dtype=torch.float64, generator=generator)
    return (MEANS[labels] + 0.3 * noise).reshape(count, 1, 4, 4), labels


def bayes(x0: Tensor) -> list[str]:
    distances = (x0.flatten(1)[:, None] - MEANS).square().sum(-1)
    return [f"c{int(k)}" for k in distances.argmin(1)]


def seeded(count: int) -> Noise:
    return Noise(tuple(range(count)), (1, 4, 4), dtype=torch.float64)


def test_it_agrees_with_bayes() -> None:
    x0, labels = samples(30)
    found = classify(CLASSES, x0, LEVELS, seeded(30))
    assert list(found.best) == bayes(x0) == [f"c{k}" for k in labels]
    assert found.evaluations == 30 * 6 * 40


def test_stages_find_the_same_for_less() -> None:
    x0, _ = samples(30)
    found = classify(CLASSES, x0, LEVELS, seeded(30), ((10, 2), (40, 1)))
    assert list(found.best) == bayes(x0)
    assert found.evaluations == 30 * (6 * 10 + 2 * 30)


def test_neither_order_nor_company_matters() -> None:
    x0, _ = samples(6)
    whole = classify(CLASSES, x0, LEVELS[:9], seeded(6))
    turned = classify(dict(reversed(CLASSES.items())), x0, LEVELS[:9], seeded(6))
    assert turned.best == whole.best
    torch.testing.assert_close(turned.errors.flip(1), whole.errors)
    torch.testing.assert_close(classify(CLASSES, x0[:2], LEVELS[:9], seeded(2)).errors, whole.errors[:2])


def test_the_error_is_that_of_the_noise() -> None:
    """One level, by hand: the same draw for every class."""
    x0, _ = samples(2)
    level, noise = Level(0.6, 0.8), seeded(2)
    drawn = noise.at(0)("classifier")
    found = classify(CLASSES, x0, [level], noise)
    expected = [(d(level.mix(x0, drawn), level).noise - drawn).square().flatten(1).mean(1) for d in CLASSES.values()]
    torch.testing.assert_close(found.errors, torch.stack(expected, 1))


def test_a_first_part_of_the_draws_is_spread() -> None:
    for count in (1, 7, 40, 64):
        order = _spread(count)
        assert sorted(order) == list(range(count))
    first = sorted(_spread(64)[:8])
    assert {b - a for a, b in pairwise(first)} == {8}


@pytest.mark.parametrize("stages", [((50, 1),), ((20, 2), (10, 1)), ((0, 1),)])
def test_wrong_stages_are_refused(stages: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(UsageError, match="rise to at most 40 draws"):
        classify(CLASSES, samples(1)[0], LEVELS, seeded(1), stages)
