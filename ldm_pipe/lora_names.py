"""What the names in an adapter's file mean: which part, which layer, and which of its tensors.

Layouts: diffusers and peft (`unet.down_blocks.0...to_q.lora_A.weight`, in older files `.lora.down.weight` and
`.processor.to_q_lora.down.weight`), kohya and LyCORIS (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`; of SDXL also with
the names of the first code, `lora_unet_input_blocks_4_1_...`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ldm_pipe.first_names import unet_name

NETWORK = "network"
PREFIXES = {
    "base_model.model.": NETWORK, "diffusion_model.": NETWORK, "unet.": NETWORK, "transformer.": NETWORK,
    "lora_unet_": NETWORK, "lora_transformer_": NETWORK, "lycoris_": NETWORK,
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    **{f"lora_te{n}_": f"text_encoder_{n}" for n in (2, 3)}, "text_encoder.": "text_encoder",
    **{f"text_encoder_{n}.": f"text_encoder_{n}" for n in (2, 3)},
}  # fmt: skip
LEAVES = {
    **dict.fromkeys(("lora_A.weight", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys(("lora_B.weight", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"), "up"),
    **dict.fromkeys(("lora_magnitude_vector.weight", "lora_magnitude_vector"), "magnitude"),
    "lora_mid.weight": "mid", "alpha": "alpha", "diff": "whole", "dora_scale": "dora_scale", "oft_R.weight": "rotation",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
}  # fmt: skip


class Key(NamedTuple):
    """part: "network", "text_encoder", "text_encoder_2", ...; layer: flat, with _ for every dot; leaf: a value of LEAVES."""

    part: str
    layer: str
    leaf: str


def key(name: str) -> Key | None:
    """What a tensor's name means, None where it is of no known layout."""
    plain = re.sub(r"\.processor\.(to_[qkv])_lora\.", r".\1.lora.", name).replace(".processor.to_out_lora.", ".to_out.0.lora.")
    plain = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", plain)  # peft's name of the adapter
    part, rest = next(((p, plain.removeprefix(x)) for x, p in PREFIXES.items() if plain.startswith(x)), (NETWORK, plain))
    for ending in sorted(LEAVES, key=len, reverse=True):
        layer = rest.removesuffix(f".{ending}")
        if layer != rest:
            return Key(part, _flat(layer), LEAVES[ending])
    return None


def layers(module: nn.Module) -> dict[str, str]:
    """Flat name -> name of every layer that an adapter may change."""
    return {_flat(n): n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def found(key: Key, known: Mapping[str, str], per_block: int) -> str | None:
    """The layer that a key means, among `known` flat names. per_block: resnets of a block, by which the first code counted."""
    if key.layer in known:
        return known[key.layer]
    old = re.fullmatch(r"(input_blocks|output_blocks)_(\d+)_(\d+)_(.+)|(middle_block)_(\d+)_(.+)", key.layer)
    if key.part != NETWORK or not old:
        return None
    place = [old[1], old[2], old[3], old[4]] if old[1] else [old[5], old[6], old[7]]
    place[-1] = re.sub(r"^(in_layers|out_layers|emb_layers)_(\d)", r"\1.\2", place[-1])
    return known.get(_flat(unet_name(".".join(place) + ".", per_block))[:-1])


def _flat(name: str) -> str:
    return name.removeprefix("text_model.").replace(".", "_").removeprefix("text_model_")
