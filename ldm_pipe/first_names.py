"""Names of the first latent diffusion code, and of OpenCLIP, in their present form.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752: CompVis' and Stability's
code, which numbered blocks through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def unet_name(name: str, layers: int) -> str:
    """The present name of a U-Net's tensor. Blocks were counted through: `layers` resnets and a change of size each."""
    for old, new in (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
                     ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
                     ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")):  # fmt: skip
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d+))?\.(.+)", name)
    if not found:
        return name
    way, i, rest = found[1], int(found[2]), found[4]
    if way == "middle":
        rest = f"{found[3]}.{rest}" if found[3] else rest
        return f"mid_block.attentions.0.{rest}" if i == 1 else f"mid_block.resnets.{i // 2}.{_resnet(rest)}"
    block, layer = divmod(i - (way == "input"), layers + 1)
    stage = f"{'down' if way == 'input' else 'up'}_blocks.{block}"
    if rest.startswith("op."):
        return f"{stage}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv.") and found[3] != "0":
        return f"{stage}.upsamplers.0.{rest}"
    return f"{stage}.resnets.{layer}.{_resnet(rest)}" if found[3] == "0" else f"{stage}.attentions.{layer}.{rest}"


def _resnet(name: str) -> str:
    for old, new in (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
                     ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")):  # fmt: skip
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def vae_name(name: str, blocks: int) -> str:
    """The present name of an autoencoder's tensor. The decoder's blocks were counted from the image on."""
    name = re.sub(r"coder\.down\.(\d+)\.block\.", r"coder.down_blocks.\1.resnets.", name)
    name = re.sub(r"coder\.down\.(\d+)\.downsample\.", r"coder.down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"coder\.up\.(\d+)\.", lambda m: f"coder.up_blocks.{blocks - 1 - int(m[1])}.", name)
    name = re.sub(r"(up_blocks\.-?\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"(up_blocks\.-?\d+)\.upsample\.", r"\1.upsamplers.0.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    for old, new in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        name = name.replace(f".mid.attn_1.{old}.", f".mid_block.attentions.0.{new}.")
    return name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")


def open_clip(name: str, tensor: Tensor, config: Any, projected: bool) -> Iterator[tuple[str, Tensor]]:
    """The present names and tensors of one of OpenCLIP's. Layers beyond the configuration's are those that the model skips."""
    tops = {"positional_embedding": "embeddings.position_embedding.weight", "token_embedding.weight":
            "embeddings.token_embedding.weight", "ln_final.weight": "final_layer_norm.weight",
            "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if name == "text_projection":
        if projected:
            yield "text_projection.weight", tensor.T
    elif not layer:
        yield tops.get(name, name), tensor
    elif int(layer[1]) < config.num_hidden_layers:
        place, rest = f"encoder.layers.{layer[1]}.", layer[2]
        for old, new in (("ln_", "layer_norm"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("attn.", "self_attn.")):
            rest = rest.replace(old, new)
        joint = re.fullmatch(r"self_attn\.in_proj_(weight|bias)", rest)
        if not joint:
            yield place + rest, tensor
        else:
            yield from zip((f"{place}self_attn.{x}_proj.{joint[1]}" for x in "qkv"), tensor.chunk(3), strict=True)
