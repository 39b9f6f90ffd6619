"""The networks of an IP-Adapter's file: what makes tokens of CLIP's view of a picture, and the keys and values they get.

IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, Ye et al. 2023, arXiv 2308.06721, section
3.2; the names are those of the published files. The resampler is Flamingo's (Alayrac et al. 2022, arXiv 2204.14198, 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe import weights
from ldm_pipe.blocks import Linear, attend
from ldm_pipe.errors import ModelError

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
HEAD = 64  # channels of a head of the resampler
PAIR = re.compile(r"(\d{1,4})\.to_([kv])_ip\.weight")
LOW = re.compile(r"(\d{1,4})\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
FACE_PLUS = "it reads CLIP's view of a face beside its vector (FaceID Plus), which is not supported; plain FaceID files are"


class Base(nn.Module):
    """One vector [N,E] of a picture -> a few tokens [N,M,D]."""

    def __init__(self, embed: int, width: int, count: int) -> None:
        super().__init__()
        self.proj, self.norm = Linear(embed, count * width), nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """The tokens."""
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.norm.normalized_shape[0])))


class Full(nn.Module):
    """Every state [N,M,E] of a picture -> a token [N,M,D]."""

    def __init__(self, embed: int, inner: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Linear(embed, inner), nn.GELU(), Linear(inner, width), nn.LayerNorm(width))

    def forward(self, states: Tensor) -> Tensor:
        """The tokens."""
        return self.proj(states)


class Face(nn.Module):
    """One vector [N,E] of a face recogniser -> a few tokens [N,M,D]: the "FaceID" files."""

    def __init__(self, embed: int, inner: int, width: int, count: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(Linear(embed, inner), nn.GELU(), Linear(inner, count * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """The tokens."""
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.norm.normalized_shape[0])))


class Reader(nn.Module):
    """Queries [N,M,C] attend to states [N,L,C] and to themselves. shift, scale [N,C]: of queries that are told a time."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_kv = Linear(width, inner, bias=False), Linear(width, 2 * inner, bias=False)
        self.to_out = Linear(inner, width, bias=False)

    def forward(self, states: Tensor, queries: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """What the queries read, [N,M,C]."""
        states, queries = self.norm1(states), moved(self.norm2(queries), shift, scale)
        k, v = self.to_kv(torch.cat([states, queries], dim=1)).chunk(2, dim=-1)
        q = self.to_q(queries)
        return self.to_out(attend(q, k, v, q.shape[-1] // HEAD))


def moved(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x [N,M,C] scaled and shifted by [N,C] each; as it is where there are none."""
    return x if shift is None or scale is None else x * (1 + scale[:, None]) + shift[:, None]


def small(width: int, inner: int) -> nn.Sequential:
    """What each query passes alone."""
    return nn.Sequential(nn.LayerNorm(width), Linear(width, inner, bias=False), nn.GELU(), Linear(inner, width, bias=False))


class Plus(nn.Module):
    """Every state [N,L,E] of a picture, read by learned queries -> tokens [N,M,D]: the resampler of the "plus" files."""

    def __init__(self, embed: int, width: int, latents: tuple[int, ...], depth: int, inner: int, wide: int) -> None:
        super().__init__()
        hidden = latents[-1]
        self.latents = nn.Parameter(torch.empty(latents))
        self.proj_in, self.proj_out, self.norm_out = Linear(embed, hidden), Linear(hidden, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.ModuleList([Reader(hidden, inner), small(hidden, wide)]) for _ in range(depth))

    def forward(self, states: Tensor) -> Tensor:
        """The tokens."""
        queries, states = self.latents.expand(len(states), -1, -1), self.proj_in(states)
        layers: Any = self.layers
        for read, alone in layers:
            queries = queries + read(states, queries)
            queries = queries + alone(queries)
        return self.norm_out(self.proj_out(queries))


@dataclass(frozen=True, eq=False)
class ImageAdapter:
    """An IP-Adapter. projection: makes the tokens; deep: of all of CLIP's states before the last layer, not of its one vector;
    weights: (keys, values), [C,D] each, of every attention to the text, in the file's order; of Flux with biases. face: it
    reads the vectors of a face recogniser. low: what is added to the layers of every attention, (down, up) by name."""

    projection: nn.Module
    deep: bool
    weights: tuple[tuple[Tensor, ...], ...]
    face: bool = False
    low: tuple[Mapping[str, tuple[Tensor, Tensor]], ...] = ()

    def __call__(self, seen: Tensor) -> Tensor:
        """[N,E] or [N,L,E] of pictures -> tokens [N,M,D]. Raises ModelError where another CLIP made them."""
        wanted = next(m.in_features for m in self.projection.modules() if isinstance(m, Linear))
        if seen.shape[-1] != wanted:
            what, who = ("faces", "the file") if self.face else ("pictures", "this image encoder")
            raise ModelError(f"the IP-Adapter reads {what} by vectors of {wanted}, {who} gives {seen.shape[-1]}")
        tokens: Tensor = self.projection(seen.float())
        return tokens

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], where: str) -> ImageAdapter:
        """From the tensors of a published file. Raises ModelError, naming the first tensor that does not fit."""
        if any(n.startswith("double_blocks.") for n in tensors):
            return _flux(tensors, where)
        inside = {n.removeprefix(PROJECTION): t for n, t in tensors.items() if n.startswith(PROJECTION)}
        layers = {n.removeprefix(LAYERS): t for n, t in tensors.items() if n.startswith(LAYERS)}
        other = sorted(n for n in tensors if not n.startswith((PROJECTION, LAYERS)))
        if other or not inside or not layers:
            found = f"holds {other[0]!r:.100}" if other else "lacks one of the two"
            raise ModelError(f"{where} is no IP-Adapter, whose tensors are image_proj... and ip_adapter...: it {found}")
        if any(n.startswith("perceiver_resampler.") for n in inside):
            raise ModelError(f"{where}: {FACE_PLUS}")
        face = "proj.2.weight" in inside and "norm.weight" in inside
        lower = {n: t for n, t in layers.items() if face and LOW.fullmatch(n)}
        pairs = _pairs({n: t for n, t in layers.items() if n not in lower}, where)
        try:
            build, deep = _build(inside, pairs[0][0].shape[1])
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"{where}: its image_proj... is none of the base, plus and full-face forms") from error
        projection = weights.filled(where, build, inside, {n: PROJECTION + n for n in inside})
        return cls(projection, deep, pairs, face, _low(lower, 2 * len(pairs), where))


def _flux(tensors: Mapping[str, Tensor], where: str) -> ImageAdapter:
    """Of Flux, in XLabs' layout: weights and biases of the blocks over image and text together."""
    head, names = "ip_adapter_proj_model.", [f"{kind}_proj.{leaf}" for kind in "kv" for leaf in ("weight", "bias")]
    inside = {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
    count = len({n.split(".")[1] for n in tensors if n.startswith("double_blocks.")})
    rows = [[f"double_blocks.{i}.processor.ip_adapter_double_stream_{n}" for n in names] for i in range(count)]
    known = {n for row in rows for n in row} | {head + n for n in inside}
    wrong = sorted(set(tensors) ^ known)
    if wrong:
        raise ModelError(f"{where}: unexpected or missing tensor {wrong[0]!r:.100} and {len(wrong) - 1} more")
    shape = tensors[rows[0][0]].shape
    if len(shape) != 2 or any(tensors[n].shape != (shape if n.endswith("weight") else shape[:1]) for row in rows for n in row):
        raise ModelError(f"{where}: mismatched tensors among double_blocks...; each is {list(shape)}")
    try:
        build, deep = _build(inside, shape[1])
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: its {head}... is none of the known forms") from error
    projection = weights.filled(where, build, inside, {n: head + n for n in inside})
    return ImageAdapter(projection, deep, tuple(tuple(tensors[n] for n in row) for row in rows))


def _build(t: Mapping[str, Tensor], width: int) -> tuple[Any, bool]:
    """(what builds the projection, does it read all states?)"""
    if "latents" in t:
        depth = 1 + max(int(n.split(".")[1]) for n in t if re.match(r"layers\.\d{1,2}\.", n))
        sizes = (t["proj_in.weight"].shape[1], width, tuple(t["latents"].shape), depth)
        inner, wide = t["layers.0.0.to_q.weight"].shape[0], t["layers.0.1.1.weight"].shape[0]
        if inner % HEAD or t["latents"].ndim != 3 or len(t["latents"]) != 1:
            raise KeyError("heads")
        return (lambda: Plus(*sizes, inner, wide)), True
    if "proj.3.weight" in t:
        inner, embed = t["proj.0.weight"].shape
        return (lambda: Full(embed, inner, width)), True
    if "proj.2.weight" in t:
        inner, embed = t["proj.0.weight"].shape
        return (lambda: Face(embed, inner, width, len(t["proj.2.weight"]) // width)), False
    if "norm.weight" in t and "proj.weight" in t:
        out, embed = t["proj.weight"].shape
        return (lambda: Base(embed, width, out // width)), False
    raise KeyError("form")


def _pairs(layers: Mapping[str, Tensor], where: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """(keys, values) of the numbers 1, 3, 5, ...: those of all attentions, of which every second is to the text."""
    named = {n: PAIR.fullmatch(n) for n in layers}
    numbers = sorted({int(m[1]) for m in named.values() if m})
    wanted = [f"{2 * i + 1}.to_{kind}_ip.weight" for i in range(len(numbers)) for kind in "kv"]
    wrong = sorted(set(layers) - set(wanted)) or sorted(set(wanted) - set(layers))
    if wrong:
        why = "; files for faces (FaceID) alone have such" if "lora" in wrong[0] else ""
        raise ModelError(f"{where}: unexpected or missing tensor {LAYERS + wrong[0]!r:.100} and {len(wrong) - 1} more{why}")
    first = layers[wanted[0]]
    bad = [n for n in wanted if layers[n].ndim != 2 or first.ndim != 2 or layers[n].shape[1] != first.shape[1]]
    bad += [k for k, v in zip(wanted[::2], wanted[1::2], strict=True) if layers[k].shape != layers[v].shape]
    if bad:
        raise ModelError(f"{where}: mismatched tensor {LAYERS + bad[0]!r:.100} and {len(bad) - 1} more")
    return tuple((layers[k], layers[v]) for k, v in zip(wanted[::2], wanted[1::2], strict=True))


def _low(found: Mapping[str, Tensor], count: int, where: str) -> tuple[dict[str, tuple[Tensor, Tensor]], ...]:
    """Of each of `count` attentions (down, up) by the name of the layer; () where there are none."""
    if not found:
        return ()
    layers = ("to_q", "to_k", "to_v", "to_out")
    rows = [[(f"{k}.{n}_lora.down.weight", f"{k}.{n}_lora.up.weight") for n in layers] for k in range(count)]
    wrong = sorted(set(found) ^ {name for row in rows for pair in row for name in pair})
    wrong = wrong or [b for row in rows for a, b in row if found[a].ndim != 2 or found[b].shape[1:] != found[a].shape[:1]]
    if wrong:
        fault = "unexpected, missing or mismatched"
        raise ModelError(f"{where}: {fault} tensor {LAYERS + wrong[0]!r:.100} and {len(wrong) - 1} more")
    return tuple({n: (found[a], found[b]) for n, (a, b) in zip(layers, row, strict=True)} for row in rows)
