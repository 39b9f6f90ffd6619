"""Distances between sets of features: closed forms of Gaussians, brute force, and what must not change them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe.analysis import clip_extractor, clip_score, coverage, frechet, kernel_distance, r_precision
from ldm_pipe.analysis.extractor import pixel_statistics
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.loading import BUILTIN


def draws(count: int, *deviations: float, mean: float = 0.0, seed: int = 0) -> Tensor:
    """Rows whose sample mean and covariance are exactly those asked for."""
    x = torch.randn(count, len(deviations), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x * torch.tensor(deviations, dtype=torch.float64) + mean


def test_frechet_is_the_closed_form_of_gaussians() -> None:
    expected = 3 * 0.5**2 + (1 - 2) ** 2 + (2 - 0.5) ** 2 + (3 - 3) ** 2  # covariances that commute
    assert frechet(draws(50, 1, 2, 3), draws(60, 2, 0.5, 3, mean=0.5, seed=1)) == pytest.approx(expected, abs=1e-8)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    a, b = draws(50, 1, 2, 3), draws(60, 2, 0.5, 3, seed=1) @ turn
    product = torch.cov(a.T) @ torch.cov(b.T)
    expected = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * torch.linalg.eigvals(product).sqrt().real.sum()
    assert frechet(a, b) == pytest.approx(float(expected), abs=1e-8)
    assert frechet(a, b) == pytest.approx(frechet(b, a), abs=1e-8)
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), abs=1e-8)
    assert abs(frechet(a, a)) < 1e-8


def test_frechet_refuses_sets_too_small() -> None:
    with pytest.raises(UsageError, match="takes more pictures than 3"):
        frechet(torch.randn(3, 3), torch.randn(50, 3))


def test_kernel_distance_is_its_definition_and_has_no_bias() -> None:
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64) + 1

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within = [np.mean([k(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)]) for s in (a, b)]
    across = np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across)
    many = torch.randn(400, 20, 3, generator=torch.Generator().manual_seed(0))
    same = [kernel_distance(x[:10], x[10:]) for x in many]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    assert min(same) < 0


def test_coverage_of_sets_that_are_known() -> None:
    real = torch.arange(10.0, dtype=torch.float64)[:, None]
    assert coverage(real, real, k=2) == pytest.approx((1, 1, coverage(real, real, k=2).density, 1))
    far = coverage(real, real + 100, k=2)
    assert (far.precision, far.recall, far.coverage) == (0, 0, 0)
    one = coverage(real, torch.tensor([[4.0], [4.1], [4.2]], dtype=torch.float64), k=1)
    assert one.precision == 1
    assert one.recall == pytest.approx(0.1)
    assert one.coverage == pytest.approx(0.3)  # 3, 4 and 5 reach one of them
    with pytest.raises(UsageError, match="k is 3"):
        coverage(real, real[:3], k=3)


def test_density_counts_how_many_balls_hold_a_picture() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]], dtype=torch.float64)
    made = torch.tensor([[1.0], [1.2], [0.9]], dtype=torch.float64)  # k = 1: reaches 1, 1, 1, 8
    inside = [sum(abs(float(m) - r) <= b for r, b in ((0, 1), (1, 1), (2, 1), (10, 8))) for m in made]
    assert coverage(real, made, k=1).density == pytest.approx(np.mean(inside))


def test_scores_of_captions() -> None:
    texts = torch.eye(3)
    assert clip_score(2 * texts, texts) == pytest.approx(100)
    assert clip_score(-texts, texts) == 0
    assert r_precision(texts, texts) == 1
    assert r_precision(texts[[1, 0, 2]], texts) == pytest.approx(1 / 3)
    assert r_precision(texts[[0, 0, 2]], texts[[0, 0, 2]]) == 1  # the same caption twice is no rival
    with pytest.raises(UsageError, match="do not go together"):
        clip_score(texts, texts[:2])
    with pytest.raises(UsageError, match="not finite"):
        clip_score(texts / 0, texts)


def test_the_built_in_clip_tells_pictures_apart_and_names_itself(tmp_path: Path) -> None:
    from train.world import render, scene_at

    scenes = [scene_at(5, i) for i in range(12)]
    pictures = [Image.fromarray(render(s)) for s, _ in scenes]
    extractor = clip_extractor(BUILTIN / "clip", BUILTIN / "tokenizer")
    assert extractor.texts is not None
    images, texts = extractor.images(pictures), extractor.texts([words for _, words in scenes])
    assert r_precision(images, texts) > 0.7
    assert clip_score(images, texts) > clip_score(images, texts.roll(1, 0)) + 10
    digest = next(x for x in (BUILTIN / "SHA256SUMS").read_text().splitlines() if x.endswith("clip/model.safetensors"))[:8]
    assert str(extractor) == f"clip(clip) {digest}"
    with pytest.raises(ModelError, match="holds no"):
        clip_extractor(tmp_path)


def test_pixels_are_scaled_as_the_folder_says(tmp_path: Path) -> None:
    assert [t.flatten().tolist() for t in pixel_statistics(tmp_path)] == [[0, 0, 0], [1, 1, 1]]
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.25, 1.0]}')
    mean, deviation = pixel_statistics(tmp_path)
    for value in (-1.0, 0.3):  # ((v + 1) / 2 - m) / s, channel by channel
        expected = [((value + 1) / 2 - m) / s for m, s in ((0.5, 0.5), (0.25, 0.25), (0.75, 1.0))]
        assert ((value - mean) / deviation).flatten().tolist() == pytest.approx(expected)
