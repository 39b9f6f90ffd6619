"""The light autoencoder equals diffusers' on every kind of configuration it claims to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import configs, load, weights
from ldm_pipe.codec import KLCodec
from ldm_pipe.loading import BUILTIN
from ldm_pipe.networks.light_vae import VAE, Config, renamed

FILE = "diffusion_pytorch_model.safetensors"
SHAPES: dict[str, dict[str, Any]] = {
    "SD 1.5, SDXL": {"blocks": 4, "layers_per_block": 2, "block_out_channels": (4, 8, 8, 8)},
    "no attention": {"blocks": 2, "block_out_channels": (8, 16), "mid_block_add_attention": False},
    "one block": {"blocks": 1, "block_out_channels": (8,), "use_post_quant_conv": False},
    "SD 3": {"blocks": 3, "block_out_channels": (4, 8, 8), "latent_channels": 16, "shift_factor": 0.06,
             "use_quant_conv": False, "use_post_quant_conv": False},
    "built-in": {"blocks": 3, "block_out_channels": (4, 8, 16), "latent_channels": 10, "mid_block_add_attention": False},
}  # fmt: skip


def made(shape: str, folder: Path) -> Any:
    from diffusers import AutoencoderKL

    config = dict(SHAPES[shape])
    blocks = config.pop("blocks")
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    theirs = AutoencoderKL(**kinds, norm_num_groups=4, **config).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.02, 0.2)
    theirs.save_pretrained(folder)
    return theirs


def ours_of(folder: Path) -> VAE:
    config = configs.known(Config, json.loads((folder / "config.json").read_text()))
    assert config is not None
    return weights.read(folder / FILE, config.parts, lambda: VAE(config), renamed)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_diffusers(shape: str, tmp_path: Path) -> None:
    """Both ways in float64, to 1e-10; alone and in the codec."""
    theirs = made(shape, tmp_path).double()
    ours = ours_of(tmp_path).double()
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64) * 2 - 1
    (found,), expected = ours.encode(images), theirs.encode(images).latent_dist
    assert (found.mean - expected.mean).abs().max() < 1e-10 * expected.mean.abs().max()
    assert (found.logvar - expected.logvar).abs().max() < 1e-10 * expected.logvar.abs().max()
    image = theirs.decode(expected.mean).sample
    assert (ours.decode(found.mean)[0] - image).abs().max() < 1e-10 * image.abs().max()
    a, b = KLCodec(ours), KLCodec(theirs)
    assert (a.channels, a.factor) == (b.channels, b.factor)
    assert torch.allclose(a.decode(a.encode(images)), b.decode(b.encode(images)), rtol=1e-9)


@torch.no_grad()
def test_the_shipped_autoencoder_equals_diffusers() -> None:
    from diffusers import AutoencoderKL

    theirs, codec = AutoencoderKL.from_pretrained(BUILTIN / "vae", torch_dtype=torch.float32), load("builtin").codec
    assert isinstance(codec, KLCodec)
    assert isinstance(codec.vae, VAE)
    latents = torch.randn(2, 10, 16, 16)
    expected = theirs.decode(latents / theirs.config.scaling_factor + theirs.config.shift_factor).sample
    assert (codec.decode(latents) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_early_names_of_the_attention_are_read(tmp_path: Path) -> None:
    made("SD 1.5, SDXL", tmp_path)
    expected, tensors = ours_of(tmp_path).state_dict(), load_file(tmp_path / FILE)
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in [n for n in tensors if ".attentions." in n and "group_norm" not in n]:
        stem, _, end = name.partition("attentions.0.")
        part, _, kind = end.rpartition(".")
        tensors[f"{stem}attentions.0.{early[part]}.{kind}"] = tensors.pop(name)
    save_file(tensors, tmp_path / FILE)
    found = ours_of(tmp_path).state_dict()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize("values", [{"latents_mean": [0.0]}, {"act_fn": "relu"}, {"force_upcast": None}, {"scaling_factor": 0},
                                    {"layers_per_block": [1]}, {"block_out_channels": []}, {"new": 1}])  # fmt: skip
def test_a_configuration_that_asks_for_more_is_not_known(values: dict[str, Any]) -> None:
    assert configs.known(Config, {"scaling_factor": 1, "_class_name": "AutoencoderKL"}) == Config(scaling_factor=1)
    assert configs.known(Config, values) is None
