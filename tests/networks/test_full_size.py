"""The published sizes, on the meta device: parameter counts, names of tensors, and that the light networks know them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ldm_pipe import configs, single
from ldm_pipe.networks import light_clip, light_unet, light_vae

PUBLISHED = {n: json.loads((single.PUBLISHED / f"{n}.json").read_text()) for n in ("sd1", "sd2", "sdxl", "sdxl-refiner")}
CLASSES: Mapping[str, tuple[Any, Any, str]] = {
    "unet": (light_unet.Config, light_unet.UNet, "UNet2DConditionModel"),
    "vae": (light_vae.Config, light_vae.VAE, "AutoencoderKL"),
    "text_encoder": (light_clip.Config, light_clip.ClipTextModel, "CLIPTextModel"),
    "text_encoder_2": (light_clip.Config, light_clip.with_projection, "CLIPTextModelWithProjection"),
}
COUNTS = {
    ("sd1", "unet"): 859_520_964, ("sd2", "unet"): 865_910_724, ("sdxl", "unet"): 2_567_463_684,
    ("sdxl-refiner", "unet"): 2_259_526_660, ("sd1", "vae"): 83_653_863, ("sdxl", "text_encoder"): 123_060_480,
    ("sd2", "text_encoder"): 340_387_840, ("sdxl", "text_encoder_2"): 694_659_840,
}  # fmt: skip
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "sd3-medium": (
        "SD3Transformer2DModel",
        {"sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
         "out_channels": 16, "pos_embed_max_size": 192},
        2_028_328_000, "transformer_blocks.23.attn.add_q_proj.weight",
    ),
    "flux-dev": (
        "FluxTransformer2DModel",
        {"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
         "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},
        11_901_408_320, "single_transformer_blocks.37.proj_mlp.weight",
    ),
    "pixart-sigma": (
        "PixArtTransformer2DModel",
        {"sample_size": 128, "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "in_channels": 4,
         "out_channels": 8, "cross_attention_dim": 1152, "caption_channels": 4096, "use_additional_conditions": False},
        610_856_096, "transformer_blocks.27.attn2.to_k.weight",
    ),
    "dit-xl-2-256": (
        "DiTTransformer2DModel",
        {"sample_size": 32, "num_layers": 28, "attention_head_dim": 72, "num_attention_heads": 16, "in_channels": 4,
         "out_channels": 8, "num_embeds_ada_norm": 1000},
        749_826_464, "transformer_blocks.27.norm1.emb.class_embedder.embedding_table.weight",
    ),
    "sana-1600m": (
        "SanaTransformer2DModel",
        {"in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
         "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
         "caption_channels": 2304, "sample_size": 32, "patch_size": 1},
        1_604_462_752, "transformer_blocks.19.attn2.to_v.weight",
    ),
}  # fmt: skip


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("model", "part"), COUNTS)
def test_light_networks_have_the_published_size(model: str, part: str) -> None:
    """And the names and shapes of the class that the file was written by."""
    config_class, build, name = CLASSES[part]
    config = configs.known(config_class, PUBLISHED[model][part])
    assert config is not None
    with torch.device("meta"):
        ours = build(config)
        theirs = _theirs(name, PUBLISHED[model][part])
    assert count(ours) == COUNTS[model, part]
    names = {n.removeprefix("text_model."): t.shape for n, t in theirs.state_dict().items()}
    assert {n: t.shape for n, t in ours.state_dict().items()} == names


def _theirs(name: str, config: Mapping[str, Any]) -> Any:
    if name.startswith("CLIP"):
        import transformers

        return getattr(transformers, name)(transformers.CLIPTextConfig(**config))
    import diffusers

    return getattr(diffusers, name).from_config(dict(config))


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_transformers_have_the_published_size(model: str) -> None:
    import diffusers

    name, config, size, tensor = TRANSFORMERS[model]
    with torch.device("meta"):
        network = getattr(diffusers, name)(**config)
    assert tensor in network.state_dict()
    assert count(network) == size
