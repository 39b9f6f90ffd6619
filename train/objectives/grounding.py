"""Grounding: the pixels of a thing are to attend to the tokens that name it, and not to those of another thing.

TokenCompose: Text-to-Image Diffusion with Token-level Supervision, Wang et al. 2023, arXiv 2312.03626, section 3.2, in another
form: cross-entropy over the tokens at every cell, in place of a share of the cells for every token, because here it is the
right one of two things that has to be found. A denoiser of few steps learns from this which side is which; from its own loss
alone the attention of the built-in model's U-Net stayed at chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm_pipe.attention import split

FLOOR = 1e-3  # attention below which no token is asked for more: the first steps stay bounded


class Maps(NamedTuple):
    """Queries [B,N,C] and keys [B,L,C] of one cross-attention, and its number of heads."""

    queries: Tensor
    keys: Tensor
    heads: int

    def masses(self, named: Tensor) -> Tensor:
        """Attention of every cell to the tokens of each thing, over the heads' mean: named [B,S,L] of 0 and 1 -> [B,N,S]."""
        q, k = (split(t.float(), self.heads) for t in (self.queries, self.keys))
        shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [B,heads,N,L]
        return (shares @ named.mT[:, None]).mean(1)


@contextmanager
def watching(network: nn.Module) -> Iterator[list[Maps]]:
    """Collect queries and keys of every cross-attention of a diffusers network while a `with` runs."""
    seen: list[Maps] = []
    asked: list[Tensor] = []
    handles = []
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            keys = _keeper(seen, asked, module.heads)
            queries = module.to_q.register_forward_hook(lambda module, args, out: asked.append(out))
            handles += [queries, module.to_k.register_forward_hook(keys)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keeper(seen: list[Maps], asked: list[Tensor], heads: int) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook behind an attention's keys, which come after its queries."""
    return lambda module, args, out: seen.append(Maps(asked.pop(), out, heads))


def grounding(maps: list[Maps], named: Tensor, boxes: Tensor) -> Tensor:
    """Cross-entropy in nats of the right thing at every cell that a thing covers, averaged over things and attentions.

    named: [B,S,L], 1 where a token names thing s, all 0 where a sample has nothing to say (such a sample adds nothing).
    boxes: [B,S,4], left, top, right, bottom of the thing as shares of the picture, 0..1.
    """
    told = (named.sum((1, 2)) > 0).float()
    total = named.new_zeros(())
    for one in maps:
        masses = one.masses(named)
        cells = _covered(boxes, round(masses.shape[1] ** 0.5))  # [B,S,N]
        right = torch.log_softmax((masses + FLOOR).log(), -1).mT  # [B,S,N]
        each = -(right * cells).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1)
        total = total + (each * told).sum() / told.sum().clamp(min=1)
    return total / max(1, len(maps))


def _covered(boxes: Tensor, side: int) -> Tensor:
    """[B,S,4] -> [B,S,side*side]: 1 in every cell that a box touches."""
    low = torch.arange(side, device=boxes.device) / side
    left, top, right, bottom = boxes[..., None].unbind(-2)  # [B,S,1]
    across = (low < right) & (low + 1 / side > left)  # [B,S,side]
    down = (low < bottom) & (low + 1 / side > top)
    return (down[..., :, None] & across[..., None, :]).flatten(-2).float()
