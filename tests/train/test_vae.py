"""The task `vae`: it trains a model's codec on pictures, leaves latents alone unless told, and the export is a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_pipe import loading
from ldm_pipe.errors import UsageError
from train.job import Job
from train.loop import run
from train.tasks.vae import Vae

WEIGHTS = Path("vae") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        blocks = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 32), 0).save(folder / f"{i}.png")
    return folder


def job(folder: Path, **changes: Any) -> Job:
    small: dict[str, Any] = {"batch": 2, "warmup": 1, "log_every": 1, "save_every": 2, "lr": 1e-3, "ema": 0.5}
    return Job(output=str(folder), steps=2, **{**small, **changes})


def task(photos: Path, **changes: Any) -> Vae:
    table = {"path": str(photos), "side": 32, "buckets": False, "crop": "random", "flip": True}
    return Vae(data=table, **changes)


def test_the_decoder_learns_and_the_encoder_stays(photos: Path, tmp_path: Path) -> None:
    for stop in (1, 0):
        run(task(photos, held_out=1, adversarial=0.5, critic_width=8), job(tmp_path / "a", stop=stop, validate_every=1))
    run(task(photos, held_out=1, adversarial=0.5, critic_width=8), job(tmp_path / "b", validate_every=1))
    old, new, straight = (
        load_file(f / WEIGHTS) for f in (loading.BUILTIN, tmp_path / "a" / "export", tmp_path / "b" / "export")
    )
    assert all(torch.equal(new[n], straight[n]) for n in straight)
    assert {n.partition(".")[0] for n in new if not torch.equal(new[n].float(), old[n].float())} <= {
        "decoder",
        "post_quant_conv",
    }
    assert not torch.equal(new["decoder.conv_out.weight"].float(), old["decoder.conv_out.weight"].float())
    assert "held_out_psnr" in (tmp_path / "a" / "log.jsonl").read_text()
    bundle = loading.load(tmp_path / "a" / "export")
    assert (bundle.codec.channels, bundle.codec.factor) == (10, 4)


def test_a_trained_encoder_brings_its_scale(photos: Path, tmp_path: Path) -> None:
    run(task(photos, train_encoder=True), job(tmp_path))
    old, new = load_file(loading.BUILTIN / WEIGHTS), load_file(tmp_path / "export" / WEIGHTS)
    assert not torch.equal(new["encoder.conv_in.weight"].float(), old["encoder.conv_in.weight"].float())
    made = task(photos)
    codec = loading.load(tmp_path / "export").codec
    with torch.no_grad():
        latents = torch.cat([codec.encode(made.batch(0, [i])["images"]).flatten() for i in range(64)])
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.mean().item() == pytest.approx(0, abs=1e-4)


def test_batches_are_pure_and_checked_without_captions(photos: Path) -> None:
    one, two = task(photos).batch(3, range(4)), task(photos).batch(3, range(2, 4))
    assert torch.equal(one["images"][2:], two["images"])
    assert torch.equal(one["noise"][2:], two["noise"])
    assert one["names"][2:] == two["names"]
    assert one["images"].shape == (4, 3, 32, 32)
    assert one["noise"].shape == (4, 10, 8, 8)
    assert not any(f.fatal for f in task(photos).check(job(photos)))
    assert not any("caption" in f.words for f in task(photos).check(job(photos)))
    with pytest.raises(UsageError, match="held_out is 5"):
        task(photos, held_out=5).facts()
    with pytest.raises(UsageError, match="has no vae"):
        task(photos, model=str(photos)).facts()
