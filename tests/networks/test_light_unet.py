"""The light U-Net equals diffusers' on every kind of configuration it claims to know, and knows nothing it does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_pipe import ModelError, configs, load, weights
from ldm_pipe.loading import BUILTIN
from ldm_pipe.networks.light_unet import Config, UNet

FILE = "diffusion_pytorch_model.safetensors"
SMALL: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2, "sample_size": 8,
}  # fmt: skip
THREE = {"block_out_channels": (8, 16, 16), "attention_head_dim": (1, 2, 4)}
LATE = {
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
}
SHAPES: dict[str, dict[str, Any]] = {
    "SD 1.5": {"layers_per_block": 2},
    "SD 2.1": {"layers_per_block": 2, "use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    "SDXL": THREE | LATE | {
        "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 10 + 6 * 8,
    },
    "built-in": THREE | LATE | {
        "in_channels": 10, "out_channels": 10, "layers_per_block": 1, "attention_head_dim": 4, "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift",
    },
    "distilled": {"layers_per_block": 1, "time_cond_proj_dim": 6},
    "other constants": {"layers_per_block": 1, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1},
    "layers per block": THREE | LATE | {"block_out_channels": (8, 8, 16), "layers_per_block": (0, 1, 2)},
    "an empty block": {"block_out_channels": (8, 8), "layers_per_block": (1, 0)},
    "an empty transformer": {"layers_per_block": 1, "transformer_layers_per_block": 0},
    "inpainting": {"in_channels": 9, "layers_per_block": 1, "act_fn": "swish"},
}  # fmt: skip


def made(config: dict[str, Any], folder: Path) -> Any:
    """A random network of diffusers, saved, no weight at a neutral value."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**(SMALL | config)).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.02, 0.2)
    theirs.save_pretrained(folder)
    return theirs


def ours_of(folder: Path) -> UNet:
    config = configs.known(Config, json.loads((folder / "config.json").read_text()))
    assert config is not None
    return weights.read(folder / FILE, config.parts, lambda: UNet(config))


def given(config: Config) -> dict[str, Any]:
    torch.manual_seed(1)
    found: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, config.cross_attention_dim, dtype=torch.float64)}
    if config.addition_embed_type == "text_time":
        pooled, sizes = torch.randn(2, 10, dtype=torch.float64), torch.tensor([[64.0, 64, 0, 8, 64, 48]] * 2)
        found["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    if config.time_cond_proj_dim:
        found["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim, dtype=torch.float64)
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_diffusers(shape: str, tmp_path: Path) -> None:
    """In float64, to 1e-10 (1e-8 where diffusers itself goes through fp32: its pooling); also where an odd size is halved."""
    theirs = made(SHAPES[shape], tmp_path)
    ours = ours_of(tmp_path)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())
    assert ours.config.parts <= len(ours.state_dict())
    for size in ((8, 8), (9, 6)):
        x, kept = torch.randn(2, ours.config.in_channels, *size, dtype=torch.float64), given(ours.config)
        time = torch.tensor([999.0, 0.5])
        expected = theirs.double()(x, time, **kept, return_dict=False)[0]
        limit = 1e-8 if ours.config.addition_embed_type == "text" else 1e-10
        assert difference(ours.double()(x, time, **kept)[0], expected) < limit


@torch.no_grad()
def test_the_shipped_network_equals_diffusers() -> None:
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(BUILTIN / "unet", torch_dtype=torch.float32)
    ours = load("builtin").model.network.unet
    assert isinstance(ours, UNet)
    x, tokens = torch.randn(2, 10, 16, 16), torch.randn(2, 24, 192)
    time = torch.tensor([900.0, 30.0])
    assert difference(ours(x, time, tokens)[0], theirs(x, time, tokens).sample) < 1e-5


def test_nothing_of_diffusers_or_transformers_is_imported() -> None:
    code = "import sys, ldm_pipe; ldm_pipe.load('builtin').text(['a']); print({'diffusers', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=BUILTIN.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


UNKNOWN: dict[str, Any] = {
    "a_new_key": 1, "class_embed_type": "timestep", "num_attention_heads": 2, "dropout": 0.1, "act_fn": "gelu",
    "mid_block_type": None, "addition_embed_type": "image", "cross_attention_dim": [12, 12], "only_cross_attention": True,
    "conv_in_kernel": 5, "attention_head_dim": 3, "block_out_channels": [8], "layers_per_block": "two", "in_channels": "4",
    "resnet_time_scale_shift": "spatial", "norm_num_groups": None, "reverse_transformer_layers_per_block": [1, 1],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "layers_per_block ": 2, "center_input_sample": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN)
def test_a_configuration_that_asks_for_more_is_not_known(key: str) -> None:
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}
    assert configs.known(Config, plain | {"_diffusers_version": "0.1", "dropout": 0.0, "act_fn": "silu"}) is not None
    assert configs.known(Config, plain | {key: UNKNOWN[key]}) is None


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("eps"), tmp_path / "model"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_not_known_falls_back(copy: Path) -> None:
    """To the class of diffusers, with the same result."""
    ours = load(copy).model.network
    change(copy, class_embeddings_concat=None)
    theirs = load(copy).model.network
    assert isinstance(ours.unet, UNet)
    assert type(theirs.unet).__module__.startswith("diffusers.")
    cond = load(copy).text(["a fox"])
    x, time = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    assert difference(ours(x, time, cond), theirs(x, time, cond)) < 1e-5


def test_split_files_fall_back(copy: Path) -> None:
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(copy / "unet").save_pretrained(copy / "split", max_shard_size="40KB")
    shutil.rmtree(copy / "unet")
    (copy / "split").rename(copy / "unet")
    assert (copy / "unet" / f"{FILE}.index.json").exists()
    assert not isinstance(load(copy).model.network.unet, UNet)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_out_channels": [10**9, 10**9]}, "block_out_channels holds 1000000000"),
        ({"block_out_channels": [10**6, 10**6], "norm_num_groups": 10}, "unexpected tensor"),
        ({"in_channels": 10**6}, "mismatched tensor 'conv_in.weight' and 0 more"),
        ({"in_channels": -4}, "unet"),
        ({"norm_num_groups": 0}, "unet"),
        ({"layers_per_block": 10**6}, "asks for"),
        ({"transformer_layers_per_block": 10**6}, "asks for"),
        ({"cross_attention_dim": "wide"}, "unet"),
        ({"norm_eps": float("inf")}, "norm_eps holds inf"),
        ({"sample_size": {"deep": [[10**30]]}}, "sample_size holds 1000"),
    ],
)
def test_absurd_numbers_are_refused_before_anything_is_made(copy: Path, values: dict[str, Any], words: str) -> None:
    change(copy, **values)
    with pytest.raises(ModelError, match=words) as caught:
        load(copy)
    assert len(str(caught.value)) <= 260


def poison(tensors: dict[str, Tensor], value: float) -> None:
    tensors["conv_in.weight"][0, 0, 0, 0] = value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), "mismatched tensor 'conv_in.bias' and 0 more"),
        (lambda t: t.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}), "not floating point: tensor 'conv_in.bias'"),
        (lambda t: [t.pop("conv_in.bias"), t.pop("conv_out.bias")], "missing tensor 'conv_in.bias' and 1 more"),
        (lambda t: poison(t, float("nan")), "NaN or Inf in tensor 'conv_in.weight'"),
        (lambda t: poison(t, float("-inf")), "NaN or Inf in tensor 'conv_in.weight'"),
    ],
)
def test_damaged_weights_are_named(copy: Path, damage: Callable[[dict[str, Tensor]], Any], words: str) -> None:
    tensors = load_file(copy / "unet" / FILE)
    damage(tensors)
    save_file(tensors, copy / "unet" / FILE)
    with pytest.raises(ModelError, match=words):
        load(copy)


def test_weights_whose_sum_overflows_are_taken(copy: Path) -> None:
    tensors = load_file(copy / "unet" / FILE)
    tensors["conv_in.weight"].fill_(3e38)
    save_file(tensors, copy / "unet" / FILE)
    assert load(copy).model.network.unet.conv_in.weight.max() == 3e38
