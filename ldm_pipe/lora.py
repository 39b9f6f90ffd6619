"""LoRA and its relatives from a file into a copy of a model: every tensor finds its layer, or nothing is changed.

Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv 2106.09685. The copy shares all weights but those that
change, so the model it was made from keeps every bit.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm_pipe import families, lora_delta, lora_fused, lora_names, weights
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.loading import Bundle
from ldm_pipe.lora_names import NETWORK
from ldm_pipe.offload import modules
from ldm_pipe.parts import read_json
from ldm_pipe.patch import root

METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"
PEFT = "base_model.model."
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "the refiner of XL"}
Layers = dict[tuple[str, str], dict[str, Tensor]]  # (part, layer) -> its tensors by lora_names.LEAVES


def copied(bundle: Bundle) -> Bundle:
    """A bundle of its own modules around the very same weights: what is put in the place of one leaves the other alone."""
    own = (bundle.model, *modules(bundle.text))
    shared = {id(t): t for m in own for t in (*m.parameters(), *m.buffers())}
    model, text = copy.deepcopy((bundle.model, bundle.text), shared)
    return dataclasses.replace(bundle, model=model, text=text)


def encoders(bundle: Bundle) -> dict[str, nn.Module]:
    """The text encoders of a bundle by the names of their folders: "text_encoder", "text_encoder_2" (the refiner's only one),
    ..."""
    return dict(zip(families.encoders(bundle.family), modules(bundle.text), strict=False))  # SD3 may have no third one


def parts(bundle: Bundle) -> dict[str, nn.Module]:
    """The modules that an adapter may change, by the names of `lora_names.Key.part`."""
    network = root(bundle.model)
    inner = getattr(network, "transformer", network)
    return {NETWORK: inner if isinstance(inner, nn.Module) else network, **encoders(bundle)}


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of an adapter's file. Raises ModelError where it is damaged, no safetensors file or not finite."""
    from safetensors import safe_open

    if file.suffix != ".safetensors" or not file.is_file():
        raise ModelError(f"{str(file)!r:.120} is no .safetensors file; other formats may hold code and are not read")
    with weights.named(file):
        header = weights.header(file, alone=True)
        wrong = [n for n, (kind, _) in header.items() if kind not in weights.FLOATS]
        if wrong or not header:
            raise ModelError(f"{file.name}: " + (f"not floating point: {wrong[0]!r:.100}" if wrong else "it holds no tensor"))
        with safe_open(file, framework="pt") as found:
            tensors = {n: found.get_tensor(n) for n in header}
            said = dict(found.metadata() or {})
    broken = [n for n, t in tensors.items() if not bool(t.isfinite().all())]
    if broken:
        raise ModelError(f"{file.name}: NaN or Inf in tensor {broken[0]!r:.100} and {len(broken) - 1} more")
    return tensors, said


def merge(bundle: Bundle, file: Path, scale: float = 1.0, partial: bool = False) -> tuple[Bundle, str]:
    """(a copy of the bundle with an adapter merged in, a sentence that says what was found).

    Raises ModelError, and changes nothing, where a tensor of the file finds no layer or does not fit it. partial: tensors that
    find no layer are left out and counted, where others find one.
    """
    mine = copied(bundle)
    modules = parts(mine)
    layers, tensors, lost = opened(modules, file, partial)
    for (part, layer), leaves in layers.items():
        module: Any = modules[part].get_submodule(layer)
        try:
            new = lora_delta.changed(module.weight.detach(), leaves, scale)
        except ValueError as error:
            raise ModelError(f"{file.name}: {layer!r:.100} of the {part}: {error}{_other(tensors, modules)}") from error
        if scale != 0:
            module.weight = nn.Parameter(new.to(module.weight.dtype), requires_grad=False)
    text = sum(part != NETWORK for part, _ in layers)
    ranks = sorted({len(t["down"]) for t in layers.values() if "down" in t})
    of = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    where = f"{len(layers) - text} layers of the network and {text} of the text encoder"
    matched = f"all {len(tensors)} tensors matched"
    if lost:
        matched = f"{len(tensors) - len(lost)} of {len(tensors)} tensors matched, {lost[0]!r:.100} is the first without a layer"
    return mine, f"{file.name}: {matched}, {where}{of}, scale {scale:g}"


def opened(modules: Mapping[str, nn.Module], file: Path, partial: bool = False) -> tuple[Layers, dict[str, Tensor], list[str]]:
    """(the tensors of a file by the layers that they are for, with the alpha that is said elsewhere; as the file has them; the
    names of those without a layer). modules: as `parts` gives them. Raises ModelError as `merge` does."""
    tensors, metadata = read(file)
    layers, lost = _placed(tensors, modules, file, partial)
    said = _Said.of(metadata, file)
    for (part, layer), leaves in layers.items():
        alpha = said.alpha(part, layer, leaves)
        if alpha is not None:
            leaves.setdefault("alpha", torch.tensor(alpha))
    return layers, tensors, lost


def _placed(
    tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module], file: Path, partial: bool
) -> tuple[Layers, list[str]]:
    """(every tensor at its layer, those that find none). Raises ModelError naming the first of these, and counting the others,
    unless `partial` allows some."""
    known = {part: lora_names.layers(m) for part, m in modules.items()}
    layout = lora_fused.layout_of(known[NETWORK])
    firsts = lora_fused.firsts(known[NETWORK], layout) if layout else {}
    count = getattr(getattr(modules[NETWORK], "config", None), "layers_per_block", 2)
    per_block = count if isinstance(count, int) else count[0]
    layers: Layers = {}
    lost, where = [], file.name
    ordered = sorted(known, key=lambda part: part != file.parent.name)  # a file of peft is named by its folder, if at all
    for name, tensor in tensors.items():
        key = lora_names.key(name)
        if key and key.part == "text_encoder_3" and key.part not in known:
            key = key._replace(part="text_encoder_2")  # kohya calls T5 the third encoder, of Flux too
        if key and name.startswith(PEFT):
            key = next((k for p in ordered if lora_names.found(k := key._replace(part=p), known[p], per_block)), key)
        layer = lora_names.found(key, known[key.part], per_block) if key and key.part in known else None
        first = firsts.get(key.layer) if key and key.part == NETWORK else None
        if key is None or (layer is None and first is None):
            lost.append(name)
            continue
        try:
            pieces = {layer: tensor} if layer is not None else _pieces(key.leaf, tensor, first, modules[NETWORK])
        except ValueError as error:
            raise ModelError(f"{where}: {name!r:.100}: {error}{_other(tensors, modules)}") from error
        for place, piece in pieces.items():
            if layers.setdefault((key.part, place), {}).setdefault(key.leaf, piece) is not piece:
                raise ModelError(f"{where}: {name!r:.100} is a second {key.leaf} of {place!r:.100}")
    if lost and not (partial and layers):
        raise ModelError(f"{where}: {lost[0]!r:.100} and {len(lost) - 1} more find no layer{_other(tensors, modules)}")
    return layers, lost


def _pieces(leaf: str, tensor: Tensor, first: lora_fused.First | None, network: nn.Module) -> dict[str, Tensor]:
    """A tensor of a layer of the first code, by the present layers."""
    assert first is not None
    rows = [len(cast(Tensor, network.get_submodule(layer).weight)) for layer in first.layers]
    return dict(zip(first.layers, lora_fused.split(leaf, tensor, rows, first.swapped), strict=True))


def _other(tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> str:
    """For which model a file seems to be made, where that is not the one that is loaded; "" where it cannot be told."""
    names = " ".join(tensors)
    if "single_transformer_blocks" in names or "double_blocks" in names:
        made = "Flux"
    elif "joint" in names or "add_k_proj" in names or "context_block" in names:
        made = "Stable Diffusion 3"
    else:
        widths = {
            t.shape[1]
            for n, t in tensors.items()
            if re.search(r"attn2.*to_[kv].*(down|lora_A|hada_w1_b|diff)", n) and t.ndim > 1
        }
        if len(widths) != 1:
            return ""
        made = _named(widths.pop())
    network = modules[NETWORK]
    layer: Any = next((m for n, m in network.named_modules() if n.endswith("attn2.to_k")), None)
    loaded = type(network).__name__ if layer is None else _named(layer.in_features)
    same = made == loaded or loaded.startswith(made.replace("Stable Diffusion ", "SD"))  # the name of a class
    return "" if same else f"; it was made for {made}, loaded is {loaded}"


def _named(width: int) -> str:
    return FAMILIES.get(width, f"a model with text features of width {width}")


@dataclasses.dataclass(frozen=True)
class _Said:
    """What the metadata of a peft file, or the configuration beside it, say of alpha, which stands in no tensor there."""

    said: Mapping[str, Any]

    @classmethod
    def of(cls, metadata: Mapping[str, str], file: Path) -> _Said:
        beside = file.with_name(CONFIG)
        if METADATA not in metadata and beside.is_file():
            return cls(read_json(beside))
        try:
            found = json.loads(metadata.get(METADATA, "{}"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"the metadata {METADATA} of the adapter are not JSON") from error
        if not isinstance(found, dict):
            raise ModelError(f"the metadata {METADATA} of the adapter are not an object")
        return cls(found)

    def alpha(self, part: str, layer: str, leaves: Mapping[str, Tensor]) -> float | None:
        """alpha of a layer, None where nothing is said: the delta is then taken as it is."""
        heads = ("unet.", "transformer.") if part == NETWORK else (f"{part}.",)
        mine = {n.removeprefix(h): v for h in heads for n, v in self.said.items() if n.startswith(h)}
        mine = mine or ({} if any("." in n for n in self.said) else dict(self.said))
        if "rotation" in leaves and (
            mine.get("use_cayley_neumann") is not False or mine.get("coft") or mine.get("block_share")
        ):
            raise ModelError(
                f"{layer!r:.100} of the {part}: OFT is read where {CONFIG} says use_cayley_neumann: false, and no coft"
            )
        name = "lora_alpha" if "down" in leaves else "alpha"
        if name not in mine or "whole" in leaves or "rotation" in leaves:
            return None
        patterns = mine.get("alpha_pattern") or {}
        chosen = next((v for p, v in patterns.items() if layer == p or layer.endswith(f".{p}")), mine[name])
        if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not math.isfinite(chosen):
            raise UsageError(f"what is said beside the adapter holds {name} {chosen!r:.40}; it takes a number")
        rank = len(leaves["down"]) if "down" in leaves else 1
        return float(chosen) * (math.sqrt(rank) if mine.get("use_rslora") else 1.0)
