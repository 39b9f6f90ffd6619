"""Adapters made part of a model, or several made one: `python -m train merge --model M --lora a.safetensors:0.8 -o NEW`.

The weights are those that `generate --lora ... --lora ...` draws with: each adapter added to what the ones before it made. NEW
is a folder, or a file that ends in .safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ldm_pipe import files, loading, lora
from ldm_pipe.doors.adapters import Adapters
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from ldm_pipe.networks import light_clip
from train import folder as model_folder
from train.data.precomputed import digest

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD = "merged.json"


def merge(model: str, adapters: Sequence[str], output: Path, kind: str = "fp32") -> list[str]:
    """Write adapters, each "FILE" or "FILE:scale", as a model folder or as one adapter. kind: of what is written, of KINDS.

    Returns a sentence for each adapter. Raises UsageError where the model is no folder or `output` exists, ModelError where an
    adapter does not fit; nothing is written then.
    """
    source = loading.BUILTIN if model == "builtin" else Path(model)
    if not source.is_dir():
        raise UsageError(f'--model is {model!r:.120}; merge takes "builtin" or a folder in diffusers\' layout')
    given = Adapters.of(adapters, []).loras
    if not given:
        raise UsageError("merge takes one --lora FILE:scale or more")
    plain = merged = loading.load(source)
    said = []
    for file, scale in given:
        merged, words = lora.merge(merged, Path(file), scale)
        said.append(words)
    before, after = lora.parts(plain), lora.parts(merged)
    rows = [{"name": Path(file).name, "sha256": files.sha256(Path(file)), "scale": scale} for file, scale in given]
    record = json.dumps({"model": digest(source, ""), "adapters": rows})
    if output.suffix == ".safetensors":
        tensors = {n: t.to(KINDS[kind]).contiguous() for n, t in _one(before, after, given).items()}
        files.write(output, save(tensors, metadata={RECORD.partition(".")[0]: record}))
        return said
    changed = {_place(source, part): module for part, module in after.items() if _differ(before[part], module)}
    with files.new_folder(output) as temp:
        _write(source, temp, changed, KINDS[kind])
        (temp / RECORD).write_text(record + "\n", encoding="utf-8")
    return said


def _differ(before: nn.Module, after: nn.Module) -> bool:
    return any(old is not new for old, new in zip(before.parameters(), after.parameters(), strict=True))


def _one(
    before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], given: Sequence[tuple[str, float]]
) -> dict[str, Tensor]:
    """The tensors of one adapter in diffusers' layout: of low-rank branches their ranks beside each other, of a layer that any
    other kind changes the whole difference."""
    held: dict[tuple[str, str], list[tuple[float, dict[str, Tensor]]]] = {}
    for file, scale in given:
        for place, leaves in lora.opened(before, Path(file))[0].items():
            held.setdefault(place, []).append((scale, leaves))
    tensors = dict[str, Tensor]()
    for (part, layer), several in held.items():
        head = ("transformer" if hasattr(before[NETWORK], "transformer_blocks") else "unet") if part == NETWORK else part
        stem = f"{head}.text_model.{layer}" if layer.startswith("encoder.layers.") else f"{head}.{layer}"
        if all(leaves.keys() - {"alpha"} == {"down", "up"} for _, leaves in several):
            tensors[f"{stem}.lora_A.weight"] = torch.cat([leaves["down"].float() for _, leaves in several])
            ups = [leaves["up"].float() * (scale * _share(leaves)) for scale, leaves in several]
            tensors[f"{stem}.lora_B.weight"] = torch.cat(ups, dim=1)
        else:
            new, old = (cast(Tensor, m[part].get_submodule(layer).weight).detach().float() for m in (after, before))
            tensors[f"{stem}.diff"] = new - old
    return tensors


def _share(leaves: Mapping[str, Tensor]) -> float:
    return float(leaves["alpha"]) / len(leaves["down"]) if "alpha" in leaves else 1.0


def _place(source: Path, part: str) -> str:
    """The folder of a part: text encoders are called by theirs."""
    if part == NETWORK:
        return "unet" if (source / "unet").is_dir() else "transformer"
    return part


def _write(source: Path, folder: Path, changed: dict[str, Any], dtype: torch.dtype) -> None:
    model_folder.copy(source, folder, list(changed))
    for place, module in changed.items():
        renamed = light_clip.renamed if place.startswith("text_encoder") else str
        model_folder.write_part(source, folder, place, module.to(dtype), renamed)
    model_folder.write_sums(folder)
