"""From scratch: fresh networks begin at zero, train, resume to the bit, and come out as folders that load and draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline
from ldm_pipe.errors import UsageError
from ldm_pipe.loading import load
from train.job import Job
from train.loop import run
from train.tasks.scratch import Scratch

UNET = {"kind": "unet", "channels": [8, 16], "attention": [False, True], "layers": [1, 1], "heads": 2, "side": 32}
DIT = {"kind": "dit", "channels": [16], "layers": [2], "heads": 2, "side": 32}


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Scratch]:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("fox" if i % 2 else "owl")

    def task(network: dict[str, Any], **fields: Any) -> Scratch:
        data = {"path": str(photos), "cache": str(tmp_path / "cache"), "buckets": False}
        return Scratch(data, str(tiny("eps")), network=network, **fields)

    return task


def job(folder: Path, **changes: Any) -> Job:
    return replace(Job(str(folder), 4, batch=2, lr=1e-2, warmup=1, ema=0.5, log_every=1, save_every=2), **changes)


@pytest.mark.parametrize(
    ("network", "path", "prediction"),
    [
        (UNET, "Flow", "flow"),
        ({**UNET, "schedule": "scaled_linear", "prediction": "v", "zero_terminal": True}, "VP", "v"),
        ({**DIT, "schedule": "linear", "prediction": "eps"}, "VP", "eps"),
    ],
)
def test_a_fresh_network_starts_at_zero_trains_and_draws(
    make: Any, tmp_path: Path, network: dict[str, Any], path: str, prediction: str
) -> None:
    task = make(network).grouped(2)
    assert (type(task.bundle.model.path).__name__, task.bundle.model.prediction.name) == (path, prediction)
    net, batch = task.net(), task.batch(0, range(2))
    level = task.plan.levels(batch["normal"], task.bundle.model.path)
    out = task.bundle.model.raw(batch["x0"], level, net._cond(batch))[1]
    assert (out == 0).all()
    straight = run(make(network), job(tmp_path / "a"))
    for stop in (1, 0):
        again = run(make(network), job(tmp_path / "b", stop=stop))
    part = "transformer" if network["kind"] == "dit" else "unet"
    name = f"{part}/diffusion_pytorch_model.safetensors"
    assert (straight / name).read_bytes() == (again / name).read_bytes()
    picture = Pipeline(load(straight))("fox", seed=1, steps=2).images[0]
    assert picture.size == (32, 32)


def test_adaln_zero_makes_every_block_the_identity(make: Any) -> None:
    dit = make({**DIT, "schedule": "linear", "prediction": "eps"}).bundle.model.network.transformer
    x, time, label = torch.randn(2, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([0, 1])
    for block in dit.transformer_blocks:
        assert torch.equal(block(x, timestep=time, class_labels=label), x)


def test_the_learned_variance_is_trained_with_hybrid(make: Any, tmp_path: Path) -> None:
    network = {**DIT, "schedule": "linear", "prediction": "eps", "variance": True}
    with pytest.raises(UsageError, match="go together"):
        make(network)
    folder = run(make(network, objective={"levels": "uniform", "hybrid": 0.001}), job(tmp_path / "run"))
    half = load(folder).model.network.transformer.proj_out_2.weight.reshape(2, 2, 8, -1)[:, :, 4:]
    assert half.abs().max() > 0  # only the bound reaches it


def test_the_fresh_weights_follow_from_the_seed(make: Any) -> None:
    state = torch.random.get_rng_state()
    one, two = make(UNET).source, make(UNET, weights_seed=1).source
    assert torch.equal(state, torch.random.get_rng_state())
    assert one != two
    assert make(UNET).source == one
    weights = [load(f).model.network.unet.conv_in.weight for f in (one, two)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({**UNET, "layers": [1]}, "one value per resolution"),
        ({**UNET, "prediction": "eps"}, "goes with schedule flow"),
        ({**UNET, "schedule": "linear", "prediction": "eps", "zero_terminal": True}, "v or x0"),
        ({**DIT, "heads": 3}, "not a multiple of 3"),
        ({**UNET, "chanels": [8]}, "did you mean 'channels'"),
    ],
)
def test_networks_that_cannot_be_are_refused(make: Any, network: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(network)
