"""Post-hoc averages: profiles of the asked width, snapshots that come back, and averages that were never kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm_pipe.errors import UsageError
from train.post_hoc import PowerAverage, coefficients, gamma_of, reconstruct, snapshots

STEPS = 400


def walk(folder: Path, width: float) -> dict[int, torch.Tensor]:
    """A random walk of weights, averaged with one width; snapshots every 50 steps; the averages by step."""
    rng, net, found = np.random.default_rng(0), nn.Linear(4, 4, bias=False), {}
    with torch.no_grad():
        net.weight.zero_()
    average = PowerAverage(net, width)
    for step in range(STEPS):
        with torch.no_grad():
            net.weight += torch.from_numpy(rng.standard_normal((4, 4))).float()
        average.update(net, step)
        found[step + 1] = average.shadow["weight"].clone()
        if (step + 1) % 50 == 0:
            average.write(folder, step + 1)
    return found


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2])
def test_the_profile_has_the_width_that_was_asked_for(width: float) -> None:
    t = np.linspace(0, 1, 200_001)[1:]
    p = t ** gamma_of(width)
    mean = (p * t).sum() / p.sum()
    assert np.sqrt((p * (t - mean) ** 2).sum() / p.sum()) == pytest.approx(width, rel=1e-3)


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    walk(tmp_path, 0.1)
    found = walk(tmp_path, 0.05)
    assert len(snapshots(tmp_path)) == 16
    assert torch.allclose(reconstruct(tmp_path, 0.05)["weight"], found[STEPS], atol=1e-4)
    assert torch.allclose(reconstruct(tmp_path, 0.05, step=200)["weight"], found[200], atol=1e-4)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.15])
def test_an_average_that_was_never_kept_is_found(tmp_path: Path, width: float) -> None:
    for kept in (0.05, 0.1):
        walk(tmp_path / "kept", kept)
    truth = walk(tmp_path / "other", width)[STEPS]
    near, far = reconstruct(tmp_path / "kept", width)["weight"], walk(tmp_path / "more", 0.05)[STEPS]
    assert (near - truth).norm() < 0.05 * truth.norm()
    assert (near - truth).norm() < (far - truth).norm() / 3


def test_weights_that_do_not_move_keep_their_size() -> None:
    for steps in (range(50, 401, 50), (2, 3, 6)):
        kept = [(s, w) for s in steps for w in (0.05, 0.1)]
        assert coefficients(kept, steps[-1], 0.08).sum() == pytest.approx(1, abs=1e-12)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"between 0 and 0\.288"):
        gamma_of(0.3)
    with pytest.raises(UsageError, match="holds no snapshots"):
        reconstruct(tmp_path, 0.05)


def test_an_average_is_the_integral_of_its_profile() -> None:
    """Weights that grow as the step: the sum of t (t^(g+1) - (t-1)^(g+1)) / T^(g+1)."""
    net = nn.Linear(1, 1, bias=False)
    average, power = PowerAverage(net, 0.1), gamma_of(0.1) + 1
    for step in range(50):
        with torch.no_grad():
            net.weight.fill_(step + 1)
        average.update(net, step)
    t = np.arange(1, 51)
    expected = (t * (t**power - (t - 1.0) ** power)).sum() / 50**power
    assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-4)
