"""AutoencoderTiny as a codec: diffusers' numbers in its own scale; a preview through one that the user names."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import ModelError, Pipeline, UsageError, parts
from ldm_pipe.cli import main
from ldm_pipe.codec import TinyCodec
from ldm_pipe.image import to_pil
from ldm_pipe.looking.preview import Decoded, through
from ldm_pipe.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
taesd: Callable[..., Any] = importlib.import_module("tiny_families").taesd


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    taesd(scaling_factor=0.5, shift_factor=0.1).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@torch.no_grad()
def test_it_encodes_and_decodes_as_diffusers_does(folder: Path) -> None:
    """latents = (z - shift) * scale, as its pipelines have it; both ways differentiable."""
    from diffusers import AutoencoderTiny

    codec, vae = parts.codec(folder), AutoencoderTiny.from_pretrained(folder)
    assert isinstance(codec, TinyCodec)
    assert (codec.channels, codec.factor) == (4, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    latents = codec.encode(images)
    torch.testing.assert_close(latents, (vae.encode(images).latents - 0.1) * 0.5)
    torch.testing.assert_close(codec.raw(latents), vae.encode(images).latents)
    torch.testing.assert_close(codec.decode(latents), vae.decode(latents / 0.5 + 0.1).sample)
    with torch.enable_grad():
        assert codec.decode(latents.requires_grad_()).sum().requires_grad


def test_half_precision_stays(folder: Path) -> None:
    assert parts.codec(folder).to(torch.device("cpu"), torch.float16).vae.dtype == torch.float16


@torch.no_grad()
def test_a_preview_through_it(folder: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last estimate, decoded by it; in a terminal the mean of the pixels below each latent pixel. No image changes."""
    monkeypatch.chdir(folder.parent)
    flags = ["-p", "a fox", "--seed", "3", "--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"]
    assert main([*flags, "-o", "plain.png"]) == 0
    assert main([*flags, "--preview", "seen.png", "--preview-decoder", str(folder), "-o", "same.png"]) == 0
    same, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("same", "plain"))
    assert np.array_equal(same, plain)
    codec = parts.codec(folder)
    latents = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")("a fox", seed=3).latents
    last = to_pil(codec.decode(latents))[0].resize((256, 256), Image.Resampling.NEAREST)
    apart = np.asarray(Image.open("seen.png"), int) - np.asarray(last, int)
    assert int(np.abs(apart).max()) <= 1
    z = torch.randn(1, 4, 8, 8)
    whole, small = Decoded(codec)(z), Decoded(codec, small=True)(z)
    assert (whole.shape, small.shape) == ((1, 3, 32, 32), (1, 3, 8, 8))
    torch.testing.assert_close(small[0, :, 2, 5], whole[0, :, 8:12, 20:24].mean((1, 2)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"_class_name": "Evil"}, "_class_name is 'Evil'; an autoencoder is one of"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"latent_channels": 10**9}, "which no model has"),
        ({"latent_channels": 5}, "mismatched|cannot be loaded|parameters"),
    ],
)
def test_a_wrong_folder_is_one_sentence(damage: dict[str, Any], words: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(ModelError, match=words):
        parts.codec(folder)


def test_what_does_not_go_together(folder: Path) -> None:
    with pytest.raises(UsageError, match="goes with --preview"):
        Request.of({"prompt": ["a fox"], "preview_decoder": "x"}).settings(None)
    own = parts.codec(folder)
    with pytest.raises(ModelError, match="'nowhere' is not a folder"):
        through("nowhere", own, torch.device("cpu"), False)
    taesd(latent_channels=6).save_pretrained(folder.parent / "other")
    with pytest.raises(UsageError, match="6 channels, 4 pixels to one, and this model's 4 and 4"):
        through(str(folder.parent / "other"), own, torch.device("cpu"), False)
