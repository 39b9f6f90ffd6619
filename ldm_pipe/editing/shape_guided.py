"""Shape-Guided Diffusion with Inside-Outside Attention, Park et al. 2022, arXiv 2212.00210, section 3.

Inside a given shape the picture attends to the object's words and to itself, outside to the other words and to itself: maps are
zeroed after the softmax and not made to sum to 1 again. Outside, the source is copied back after every step, at the level the
step has reached (the official code takes the one before). The paper's inversion runs under the same rule; here it is the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.attention import Site, grid
from ldm_pipe.cond import Cond
from ldm_pipe.editing.pairs import Pairs, spliced
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import CondAt, Denoiser
from ldm_pipe.noise import StepNoise
from ldm_pipe.tokens import places, words
from ldm_pipe.walk import Sampler, Step, Wrapping


@dataclass(frozen=True)
class ShapeGuided:
    """Shape-guided: the target's object takes the shape of a mask, what lies outside is the source's. Needs a mask.

    outside: prompt of what lies outside. scale: of the words that the source does not have (the paper's 2.5). own: the share of
    the steps, 0..1, in which self-attention is split too. The paper guides with a scale of 4.5 over 50 steps of DDIM.
    """

    outside: str = ""
    scale: float = 2.5
    own: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.own <= 1:
            raise UsageError(f"edit: own takes 0 to 1, got {self.own}")

    def __call__(self, pairs: Pairs) -> Pairs:
        """The run with the rule in the targets' attention, their tokens split and the source around them."""
        if pairs.mask is None:
            raise UsageError("shape_guided needs the object's shape: give a picture and a mask of it, white inside")
        text, targets = pairs.text, tuple(t for _, t in pairs.rows)
        spans, known = places(text.tokenizer, text.window, pairs.target), words(pairs.source)
        new = tuple(i for word, span in spans if word not in known for i in span)
        rule = InsideOutside(pairs.mask, targets, new, self.scale, pairs.until(self.own))
        outside = text([self.outside])
        conds = {name: _split(cond, targets, outside if name == "cond" else None) for name, cond in _conds(pairs).items()}
        sampler = Backdrop(pairs.sampler, pairs.mask, pairs.rows)
        return replace(pairs, conds={**pairs.conds, **conds}, sampler=sampler).attending(rule)


@dataclass(frozen=True, eq=False)
class InsideOutside:
    """An AttentionRule. mask: [1,1,H,W], above .5 = inside; rows: of every one of the `branches` that it applies to. Of M
    tokens the first half after the start is the inside's, the second the outside's; the start is not attended to.

    new: places of tokens that the first branch attends to `scale` times as much. own: the noise u above which self-attention is
    split.
    """

    mask: Tensor
    rows: tuple[int, ...]
    new: tuple[int, ...] = ()
    scale: float = 2.5
    own: float = 0.0
    branches: tuple[str, ...] = ("cond", "uncond")

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """The rows' result in both halves of the image. Attention is linear in the values, so zeroed places of its maps are
        zeroed values, and no map is ever held."""
        if not self.rows or (not site.cross and float(site.rows.level.u) <= self.own):
            return out
        height, width = self.mask.shape[2:]
        inside = shape(self.mask, grid(q.shape[2], height, width)).flatten().to(q.device)  # [L]
        out = out.clone()
        for branch in self.branches:
            first = site.rows.of(branch)
            if first is None:
                continue
            rows = [first.start + r for r in self.rows]
            bias = None if site.bias is None else site.bias[rows].to(q)
            weights = self._weights(branch, k.shape[2]) if site.cross else torch.stack([inside, ~inside])
            a, b = (
                F.scaled_dot_product_attention(q[rows], k[rows], v[rows] * w.to(v)[:, None], attn_mask=bias) for w in weights
            )
            out[rows] = torch.where(inside[:, None], a, b)
        return out

    def _weights(self, branch: str, count: int) -> Tensor:
        """What the columns of a cross-attention map are scaled by, [2,M]: inside, outside."""
        half = (count - 1) // 2
        weights = torch.zeros(2, count)
        weights[0, 1 : 1 + half] = weights[1, 1 + half : 1 + 2 * half] = 1
        if branch == self.branches[0]:
            weights[0, [i for i in self.new if i <= half]] = self.scale
        return weights


@dataclass(frozen=True, eq=False)
class Backdrop(Wrapping):
    """After a step of another sampler, targets become their sources outside of a shape. mask: [1,1,H,W], above .5 = inside;
    pairs: rows (source, target)."""

    sampler: Sampler
    mask: Tensor
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)

    def down(self, denoise: Denoiser, x: Tensor, here: Level, there: Level, memory: Any, noise: StepNoise) -> Step:
        """One step of the sampler, and the source outside."""
        done = self.sampler.step(denoise, x, here, there, memory, noise)
        s, t = ([pair[k] for pair in self.pairs] for k in (0, 1))
        x = done.x.clone()
        x[t] = torch.where(shape(self.mask, (x.shape[2], x.shape[3])).to(x.device), x[t], x[s])
        return done._replace(x=x)


def shape(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [1,1,H,W] at another resolution, by its nearest pixels, True inside."""
    return F.interpolate(mask.float(), size, mode="nearest") > 0.5


def halved(inside: Tensor, outside: Tensor) -> Tensor:
    """Tokens [B,L,...] of which the first half after the start is `inside`'s and the second half `outside`'s, each from its own
    first token on: 38 and 38 of CLIP's 77. What is longer is cut off."""
    half = (inside.shape[1] - 1) // 2
    return spliced(inside, outside, [(1, range(1 + half, 1 + 2 * half))])


def _conds(pairs: Pairs) -> Mapping[str, Cond | CondAt]:
    """The conditions of the whole batch, the usual ones where the run has no others."""
    text, count = pairs.text, len(pairs.rows)
    usual = {"cond": [pairs.source] * count + [pairs.target] * count, "uncond": [pairs.negative] * (2 * count)}
    return {name: pairs.conds.get(name) or text(prompts) for name, prompts in usual.items()}


def _split(cond: Cond | CondAt, rows: tuple[int, ...], outside: Cond | None) -> Cond | CondAt:
    """A condition whose rows see, after their first half, the tokens of `outside`, or their own once more."""
    if not isinstance(cond, Cond):
        return lambda level: _fixed(cond(level), rows, outside)
    return _fixed(cond, rows, outside)


def _fixed(cond: Cond, rows: tuple[int, ...], outside: Cond | None) -> Cond:
    parts = {}
    for name in ("tokens", "mask"):
        whole, other = getattr(cond, name), getattr(outside, name) if outside else None
        if whole is not None:
            mine = whole[list(rows)]
            parts[name] = whole.clone()
            parts[name][list(rows)] = halved(mine, mine if other is None else other.to(mine).expand_as(mine))
    return replace(cond, **parts)
