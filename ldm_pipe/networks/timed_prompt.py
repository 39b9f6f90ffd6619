"""The networks of an IP-Adapter's file for Stable Diffusion 3 and 3.5: tokens of a picture that depend on the time, and what
every attention makes of them.

IP-Adapter (Ye et al. 2023, arXiv 2308.06721) as InstantX publish it for 3.5; the resampler is that of "plus" files (Alayrac et
al. 2022, arXiv 2204.14198, 2.1), its queries scaled and shifted by the time as in DiT (Peebles and Xie 2022, arXiv 2212.09748,
section 3.2). The names are those of the published files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe import weights
from ldm_pipe.attention import split
from ldm_pipe.blocks import Linear
from ldm_pipe.errors import ModelError
from ldm_pipe.networks.image_prompt import HEAD, LAYERS, PROJECTION, Reader, moved, small

EPS = 1e-6


class Resampler(nn.Module):
    """States [N,L,E] of a picture at a time [1] on the clock of the network, 0..1000 -> (tokens [N,M,D], the time [1,C])."""

    def __init__(self, embed: int, width: int, latents: tuple[int, ...], depth: int, inner: int, wide: int, clock: int) -> None:
        super().__init__()
        hidden, self.clock = latents[-1], clock
        self.latents = nn.Parameter(torch.empty(latents))
        self.proj_in, self.proj_out, self.norm_out = Linear(embed, hidden), Linear(hidden, width), nn.LayerNorm(width)
        self.time_embedding = nn.ModuleDict({"linear_1": Linear(clock, hidden), "linear_2": Linear(hidden, hidden)})
        self.layers = nn.ModuleList(
            nn.ModuleList([Reader(hidden, inner), small(hidden, wide), nn.Sequential(nn.SiLU(), Linear(hidden, 4 * hidden))])
            for _ in range(depth)
        )

    def forward(self, states: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the time that the attentions are told."""
        half = self.clock // 2
        angles = time.float() * torch.exp(-math.log(10000) * torch.arange(half, device=time.device) / half)
        waves = torch.cat([angles.cos(), angles.sin()])[None].to(states.dtype)
        told = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](waves)))
        queries, states = self.latents.expand(len(states), -1, -1), self.proj_in(states) + told[:, None]
        layers: Any = self.layers
        for read, alone, timed in layers:
            shift, scale, shift_2, scale_2 = timed(told).chunk(4, dim=1)
            queries = queries + read(states, queries, shift, scale)
            queries = queries + alone[1:](moved(alone[0](queries), shift_2, scale_2))
        return self.norm_out(self.proj_out(queries)), told


class Beside(nn.Module):
    """What an attention of image and text, of heads of `head` channels, makes of the tokens beside its own queries."""

    def __init__(self, width: int, tokens: int, clock: int, head: int) -> None:
        super().__init__()
        self.norm_ip = nn.ModuleDict({"linear": Linear(clock, 2 * tokens)})
        self.to_k_ip, self.to_v_ip = Linear(tokens, width, bias=False), Linear(tokens, width, bias=False)
        self.norm_q, self.norm_k, self.norm_ip_k = (nn.RMSNorm(head, EPS) for _ in range(3))

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor], tokens: Tensor, told: Tensor) -> Tensor:
        """inputs: the image's q, k, v [B,heads,L,C/heads], not normed; tokens [B,M,D]; told [1,T] -> [B,L,C]."""
        shift, scale = self.norm_ip["linear"](F.silu(told)).chunk(2, dim=1)
        seen = moved(F.layer_norm(tokens, tokens.shape[-1:], eps=EPS), shift, scale)
        q, k, v = inputs
        also = self.norm_ip_k(split(self.to_k_ip(seen), q.shape[1])), split(self.to_v_ip(seen), q.shape[1])
        k, v = torch.cat([self.norm_k(k), also[0]], dim=2), torch.cat([v, also[1]], dim=2)
        return F.scaled_dot_product_attention(self.norm_q(q), k, v).transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class TimedAdapter:
    """An IP-Adapter of Stable Diffusion 3. beside: of every attention, in the order of the blocks."""

    projection: Resampler
    beside: tuple[Beside, ...]

    @staticmethod
    def knows(names: Mapping[str, Tensor]) -> bool:
        """Is it this layout?"""
        return f"{LAYERS}0.norm_ip.linear.weight" in names

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], where: str) -> TimedAdapter:
        """From the tensors of a published file. Raises ModelError, naming the first tensor that does not fit."""
        inside = {n.removeprefix(PROJECTION): t for n, t in tensors.items() if n.startswith(PROJECTION)}
        found = [re.fullmatch(rf"{re.escape(LAYERS)}(\d{{1,4}})\.(.+)", n) for n in tensors]
        count = len({m[1] for m in found if m})
        rows: list[dict[str, Tensor]] = [{} for _ in range(count)]
        for name, match in zip(tensors, found, strict=True):
            if match and int(match[1]) < count:
                rows[int(match[1])][match[2]] = tensors[name]
            elif not name.startswith(PROJECTION):
                raise ModelError(f"{where}: unexpected tensor {name!r:.100}")
        try:
            projection = weights.filled(where, lambda: _resampler(inside), inside, {n: PROJECTION + n for n in inside})
            beside = tuple(_beside(row, f"{where} ({LAYERS}{k})") for k, row in enumerate(rows))
        except (KeyError, IndexError, ValueError) as error:
            raise ModelError(f"{where}: missing tensor {error}, or one of another shape") from error
        return cls(projection, beside)


def _resampler(t: Mapping[str, Tensor]) -> Resampler:
    depth = len({n.split(".")[1] for n in t if n.startswith("layers.")})
    inner, wide = t["layers.0.0.to_q.weight"].shape[0], t["layers.0.1.1.weight"].shape[0]
    if inner % HEAD or t["latents"].ndim != 3 or len(t["latents"]) != 1:
        raise KeyError("latents")
    clock = t["time_embedding.linear_1.weight"].shape[1]
    return Resampler(
        t["proj_in.weight"].shape[1], len(t["proj_out.weight"]), tuple(t["latents"].shape), depth, inner, wide, clock
    )


def _beside(t: Mapping[str, Tensor], where: str) -> Beside:
    (width, tokens), clock, head = t["to_k_ip.weight"].shape, t["norm_ip.linear.weight"].shape[1], len(t["norm_q.weight"])
    return weights.filled(where, lambda: Beside(width, tokens, clock, head), t, {})
