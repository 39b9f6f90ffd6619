"""Networks of SD3 and Flux as their authors' single files have them: what every tensor is called now, and the sizes it tells.

Names are those of Stability's sd3 (Esser et al. 2024, arXiv 2403.03206) and of Black Forest Labs' flux
(https://github.com/black-forest-labs/flux). Queries, keys and values lie in one tensor there, and in two places shift and scale
stand in the other order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """blocks: a block's name to its present one. tops, inside: stems of names outside and inside of blocks. joint: stems of
    tensors that are several of the present ones, one below the other. swapped: shift before scale; those of `last` only in
    the last block."""

    blocks: Mapping[str, str]
    tops: Mapping[str, str]
    inside: Mapping[str, str]
    joint: Mapping[str, tuple[str, ...]]
    swapped: tuple[str, ...] = ("final_layer.adaLN_modulation.1",)
    last: tuple[str, ...] = ()
    bare: Mapping[str, str] = field(default_factory=dict)

    def present(self, name: str, tensor: Tensor, blocks: int, width: int) -> Iterator[tuple[str, Tensor]]:
        """The present names and tensors of one. blocks: how many there are of the first kind; width: of the network."""
        stem, _, leaf = name.rpartition(".")
        found = re.fullmatch(r"(\w+_blocks)\.(\d+)\.(.+)", stem)
        leaf = "weight" if leaf == "scale" else leaf
        if name in self.bare:
            yield self.bare[name], tensor
        elif not found or found[1] not in self.blocks:
            yield f"{self.tops.get(stem, stem)}.{leaf}", _swap(tensor) if stem in self.swapped else tensor
        else:
            place, rest = f"{self.blocks[found[1]]}.{found[2]}", found[3]
            if rest in self.last and int(found[2]) == blocks - 1:
                tensor = _swap(tensor)
            new = self.joint.get(rest)
            if new is None:
                yield f"{place}.{self.inside.get(rest, rest)}.{leaf}", tensor
            else:
                for k, one in enumerate(new):
                    end = len(tensor) if k == len(new) - 1 else (k + 1) * width
                    yield f"{place}.{one}.{leaf}", tensor[k * width : end]

    def count(self, names: Shapes, block: str) -> int:
        """How many blocks of a kind the names have."""
        return len({m[1] for n in names if (m := re.match(rf"{block}\.(\d+)\.", n))})


def _swap(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _both(old: str, new: str, *rest: str) -> dict[str, str]:
    """The stem of a pair of layers, and what is appended to either."""
    return {old + a: new + b for a, b in (pair.split(" ") for pair in rest)}


_MLP = (".mlp.0 .linear_1", ".mlp.2 .linear_2")
_IN = (".in_layer .linear_1", ".out_layer .linear_2")
SD3 = Layout(
    blocks={"joint_blocks": "transformer_blocks"},
    bare={"pos_embed": "pos_embed.pos_embed"},
    tops={
        "x_embedder.proj": "pos_embed.proj", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        **_both("t_embedder", "time_text_embed.timestep_embedder", *_MLP),
        **_both("y_embedder", "time_text_embed.text_embedder", *_MLP),
    },
    inside={
        "x_block.attn.proj": "attn.to_out.0", "x_block.attn2.proj": "attn2.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        **{f"x_block.{a}.ln_{x}": f"{a}.norm_{x}" for a in ("attn", "attn2") for x in "qk"},
        **{f"context_block.attn.ln_{x}": f"attn.norm_added_{x}" for x in "qk"},
        **_both("x_block", "", ".adaLN_modulation.1 norm1.linear", ".mlp.fc1 ff.net.0.proj", ".mlp.fc2 ff.net.2"),
        **_both("context_block", "", ".adaLN_modulation.1 norm1_context.linear", ".mlp.fc1 ff_context.net.0.proj",
                ".mlp.fc2 ff_context.net.2"),
    },
    joint={
        **{f"x_block.{a}.qkv": tuple(f"{a}.to_{x}" for x in "qkv") for a in ("attn", "attn2")},
        "context_block.attn.qkv": tuple(f"attn.add_{x}_proj" for x in "qkv"),
    },
    last=("context_block.adaLN_modulation.1",),
)  # fmt: skip
FLUX = Layout(
    blocks={"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
    tops={
        "txt_in": "context_embedder", "img_in": "x_embedder", "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        **_both("time_in", "time_text_embed.timestep_embedder", *_IN),
        **_both("vector_in", "time_text_embed.text_embedder", *_IN),
        **_both("guidance_in", "time_text_embed.guidance_embedder", *_IN),
    },
    inside={
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "modulation.lin": "norm.linear",
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "linear2": "proj_out",
        **{f"{p}norm.{long}_norm": f"attn.norm_{x}" for p in ("img_attn.", "") for long, x in (("query", "q"), ("key", "k"))},
        **{f"txt_attn.norm.{long}_norm": f"attn.norm_added_{x}" for long, x in (("query", "q"), ("key", "k"))},
        **_both("img_mlp", "ff.net", ".0 .0.proj", ".2 .2"), **_both("txt_mlp", "ff_context.net", ".0 .0.proj", ".2 .2"),
    },
    joint={
        "img_attn.qkv": tuple(f"attn.to_{x}" for x in "qkv"), "txt_attn.qkv": tuple(f"attn.add_{x}_proj" for x in "qkv"),
        "linear1": (*(f"attn.to_{x}" for x in "qkv"), "proj_mlp"),
    },
)  # fmt: skip
LAYOUTS = {"sd3": SD3, "flux": FLUX}


def config(model: str, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of diffusers' class that has these tensors. given: what shapes do not tell, the width of a head among
    them. Raises ModelError on a tensor that is missing or not of the kind."""
    try:
        return {**given, **(_sd3 if model == "sd3" else _flux)(shapes, int(given["attention_head_dim"]))}
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"missing tensor {error}, or one of another shape") from error


def _sd3(shapes: Shapes, head: int) -> dict[str, Any]:
    width, channels, patch = shapes["x_embedder.proj.weight"][:3]
    blocks = SD3.count(shapes, "joint_blocks")
    return {
        "num_layers": blocks,
        "num_attention_heads": width // head,
        "caption_projection_dim": width,
        "in_channels": channels,
        "patch_size": patch,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "dual_attention_layers": tuple(k for k in range(blocks) if f"joint_blocks.{k}.x_block.attn2.qkv.weight" in shapes),
    }


def _flux(shapes: Shapes, head: int) -> dict[str, Any]:
    width, channels = shapes["img_in.weight"][:2]
    return {
        "num_layers": FLUX.count(shapes, "double_blocks"),
        "num_single_layers": FLUX.count(shapes, "single_blocks"),
        "num_attention_heads": width // head,
        "in_channels": channels,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }
