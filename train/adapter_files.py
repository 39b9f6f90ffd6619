"""Trained adapters as files: diffusers' layout with peft's metadata, kohya's and LyCORIS', and peft's folders.

| kind | files |
|---|---|
| lora, dora | pytorch_lora_weights.safetensors (diffusers, peft), kohya.safetensors |
| loha, lokr | kohya.safetensors (LyCORIS), peft/unet/ (or transformer/), peft/text_encoder/ and peft/text_encoder_2/ |
| oft | peft/unet/ (or transformer/), peft/text_encoder/ and peft/text_encoder_2/ |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import lora, lora_fused, lora_names
from ldm_pipe.lora_names import NETWORK
from train.adapting import Low
from train.deltas import Delta

DIFFUSERS, KOHYA, PEFT = "pytorch_lora_weights.safetensors", "kohya.safetensors", "adapter_model.safetensors"
PEFT_NAMES = {
    "down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight", "rotation": "oft_R.weight",
}  # fmt: skip
KOHYA_NAMES = {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"}
Branches = Mapping[str, Low | Delta]


def write(branches: Branches, kind: str, network: tuple[str, nn.Module], folder: Path, alone: bool = True) -> None:
    """Branches by "part.layer". network: what diffusers calls it, "unet" or "transformer", and itself. alone: the model has one
    text encoder, which kohya does not number."""
    name, module = network
    if kind in ("lora", "dora"):
        _diffusers(branches, kind, name, folder / DIFFUSERS)
    else:
        _peft(branches, kind, name, folder / "peft")
    if kind != "oft":
        _kohya(branches, kind, module, folder / KOHYA, alone)


def _placed(branches: Branches, network: str) -> dict[str, dict[str, Low | Delta]]:
    """Head of a name -> layer -> branch."""
    found: dict[str, dict[str, Low | Delta]] = {}
    for name, branch in branches.items():
        part, _, layer = name.partition(".")
        found.setdefault(network if part == NETWORK else part, {})[layer] = branch
    return found


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _diffusers(branches: Branches, kind: str, network: str, file: Path) -> None:
    tensors, said = dict[str, Tensor](), dict[str, Any]()
    for head, layers in _placed(branches, network).items():
        for layer, branch in layers.items():
            stem = _of_clip(f"{head}.", layer) if head.startswith("text_encoder") else f"{head}.{layer}"
            for leaf, tensor in branch.tensors().items():
                kept = _kept(tensor)
                if leaf == "magnitude" and branch.tensors()["down"].ndim == 4:
                    kept = kept.reshape(1, -1, 1, 1)  # as peft has those of a convolution
                tensors[f"{stem}.{PEFT_NAMES[leaf]}"] = kept
        first = next(iter(layers.values()))
        table = {"r": first.rank, "lora_alpha": first.alpha, "target_modules": list(layers)}
        table |= {
            "rank_pattern": {n: b.rank for n, b in layers.items()},
            "alpha_pattern": {n: b.alpha for n, b in layers.items()},
        }
        table |= {"use_dora": True} if kind == "dora" else {}
        said |= {f"{head}.{name}": value for name, value in table.items()}
    save_file(tensors, file, metadata={lora.METADATA: json.dumps(said)})  # one entry: of several the order is random


def _of_clip(head: str, layer: str) -> str:
    """A layer of a CLIP under the name that older classes had for it, which files keep; some classes still have it."""
    inner = layer.removeprefix("text_model.")
    return f"{head}text_model.{inner}" if inner.startswith("encoder.") else head + inner


def _kohya(branches: Branches, kind: str, network: nn.Module, file: Path, alone: bool) -> None:
    """SD3 and Flux have LoRA under their authors' names there, and LyCORIS' kinds under the present ones."""
    known = lora_names.layers(network)
    layout = lora_fused.layout_of(known)
    firsts = lora_fused.firsts(known, layout) if layout and kind == "lora" else {}
    tensors, left = _fused(branches, firsts, network)
    alpha = next(iter(branches.values())).alpha  # one for the whole file: diffusers misreads a mixture
    heads = {NETWORK: "lycoris_" if layout and kind != "lora" else "lora_unet_"}
    for name, branch in left.items():
        part, _, layer = name.partition(".")
        number = "" if alone else part.removeprefix("text_encoder").removeprefix("_") or "1"
        stem = (heads[part] + layer if part in heads else _of_clip(f"lora_te{number}_", layer)).replace(".", "_")
        held = {leaf: _kept(tensor) for leaf, tensor in branch.tensors().items()}
        if "up" in held:
            held["up"] *= branch.alpha / alpha
        if "magnitude" in held:
            held["magnitude"] = held["magnitude"].reshape(-1, *[1] * (held["down"].ndim - 1))
        tensors |= {f"{stem}.{KOHYA_NAMES.get(leaf, leaf)}": tensor for leaf, tensor in held.items()}
        tensors[f"{stem}.alpha"] = next(iter(held.values())).new_tensor(alpha if "up" in held else branch.alpha)
    module = "networks.lora" if kind == "lora" else "lycoris.kohya"
    save_file(tensors, file, metadata={"ss_network_module": module})


def _fused(
    branches: Branches, firsts: Mapping[str, lora_fused.First], network: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Low | Delta]]:
    """(tensors of the network's branches under the names of the first code, alpha in them; the branches that have none)."""
    tensors, left = dict[str, Tensor](), dict(branches)
    for name, first in firsts.items():
        held = [left.pop(f"{NETWORK}.{layer}", None) for layer in first.layers]
        if not any(held):
            continue
        rows = [len(cast(Tensor, network.get_submodule(layer).weight)) for layer in first.layers]
        pairs = [_scaled(branch) for branch in held]
        down, up = (
            pairs[0] if len(rows) == 1 and pairs[0] and not first.swapped else lora_fused.joined(pairs, rows, first.swapped)
        )
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": down.new_tensor(len(down))}
    return tensors, left


def _scaled(branch: Low | Delta | None) -> tuple[Tensor, Tensor] | None:
    """(down, up) with alpha in it."""
    if branch is None:
        return None
    held = branch.tensors()
    return _kept(held["down"]), _kept(held["up"]) * (branch.alpha / branch.rank)


def _peft(branches: Branches, kind: str, network: str, folder: Path) -> None:
    """A folder for every part; names are those of the present classes, whose text encoder is no `text_model` any more."""
    for head, layers in _placed(branches, network).items():
        inside = folder / head
        inside.mkdir(parents=True)
        tensors = {
            f"{lora.PEFT}{layer}.{PEFT_NAMES.get(leaf, leaf)}": _kept(tensor)
            for layer, branch in layers.items()
            for leaf, tensor in branch.tensors().items()
        }
        save_file(tensors, inside / PEFT, metadata={"format": "pt"})
        rank, alpha = (getattr(next(iter(layers.values())), name) for name in ("rank", "alpha"))
        told: dict[str, Any] = {"peft_type": kind.upper(), "target_modules": list(layers)}
        if kind == "oft":
            told |= {"r": 0, "oft_block_size": rank, "use_cayley_neumann": False, "coft": False, "block_share": False}
        else:
            told |= {"r": rank, "alpha": alpha, "use_effective_conv2d": False}
            told["rank_pattern"] = {n: b.rank for n, b in layers.items()}
            told["alpha_pattern"] = {n: b.alpha for n, b in layers.items()}
        (inside / lora.CONFIG).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
