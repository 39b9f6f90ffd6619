"""Adapters under the names of the authors' code of SD3 and Flux, where several of the present layers are one.

kohya's sd-scripts and ComfyUI name layers as those files do (`lora_unet_double_blocks_0_img_attn_qkv`, and with dots
`diffusion_model.double_blocks.0.img_attn.qkv`); queries, keys and values are one layer there, with one down and one up for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.flow_names import FLUX, SD3, Layout

BY_ROWS = {"up", "magnitude", "dora_scale", "whole", "hada_w1_a", "hada_w2_a"}  # an output of the layer each
SHARED = {"down", "mid", "alpha", "hada_w1_b", "hada_w2_b", "rotation"}


class First(NamedTuple):
    """What a layer is in the first code. name: flat; layers: the present ones it is made of, in the order of its rows; swapped:
    its two halves stand in the other order."""

    name: str
    layers: tuple[str, ...]
    swapped: bool


def firsts(known: Mapping[str, str], layout: Layout) -> dict[str, First]:
    """Flat first name -> what it is, of every layer that the network has. known: flat present name -> present name."""
    found: dict[str, First] = {}
    for old, own in layout.tops.items():
        if _flat(own) in known:
            found[_flat(old)] = First(_flat(old), (known[_flat(own)],), old in layout.swapped)
    for kind, present in layout.blocks.items():
        count = len({m[1] for name in known if (m := re.match(rf"{present}_(\d+)_", name))})
        pairs = [*layout.joint.items(), *((a, (b,)) for a, b in layout.inside.items())]
        for k in range(count):
            taken: set[str] = set()
            for old, new in sorted(pairs, key=lambda pair: -len(pair[1])):  # a block that has linear1 has no img_attn.qkv
                layers = tuple(known[flat] for one in new if (flat := _flat(f"{present}.{k}.{one}")) in known)
                if len(layers) == len(new) and not taken & {*layers}:
                    taken |= {*layers}
                    name = _flat(f"{kind}.{k}.{old}")
                    found[name] = First(name, layers, old in layout.last and k == count - 1)
    return found


def layout_of(known: Mapping[str, str]) -> Layout | None:
    """Whose names a network's layers have had, None where the code was always this one."""
    if any(name.startswith("single_transformer_blocks_") for name in known):
        return FLUX
    return SD3 if any(re.match(r"transformer_blocks_\d+_attn_add_[qkv]_proj", name) for name in known) else None


def split(leaf: str, tensor: Tensor, rows: Sequence[int], swapped: bool) -> list[Tensor]:
    """A tensor of the first layer as those of the present ones with so many outputs. Raises ValueError where it cannot be."""
    if leaf in SHARED or (len(rows) == 1 and not swapped):
        return [tensor] * len(rows)
    if leaf not in BY_ROWS:
        raise ValueError(f"{leaf} cannot be divided between the layers that it is for")
    if len(tensor) != sum(rows):
        raise ValueError(f"its {leaf} has {len(tensor)} rows; the layers it is for have {sum(rows)} outputs")
    return list(torch.split(torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor, list(rows)))


def joined(parts: Sequence[tuple[Tensor, Tensor] | None], rows: Sequence[int], swapped: bool) -> tuple[Tensor, Tensor]:
    """(down [R,in], up [sum of rows,R]) of the first layer, from (down, up) of the present ones, None where one has none.

    R is the sum of their ranks: up is zero where a layer does not see another one's down.
    """
    held = [pair for pair in parts if pair is not None]
    up = held[0][1].new_zeros(sum(rows), sum(len(down) for down, _ in held))
    row = column = 0
    for pair, many in zip(parts, rows, strict=True):
        if pair is not None:
            up[row : row + many, column : column + len(pair[0])] = pair[1]
            column += len(pair[0])
        row += many
    return torch.cat([down for down, _ in held]), torch.cat(up.chunk(2)[::-1]) if swapped else up


def _flat(name: str) -> str:
    return name.replace(".", "_")
