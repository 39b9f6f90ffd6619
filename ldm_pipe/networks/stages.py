"""The stages of a U-Net: the blocks of one resolution, on the way down, in the middle and on the way up.

Each is called as a module, so that a patch may stand around it. Rombach et al. 2022, arXiv 2112.10752, appendix E.2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_pipe.blocks import Resnet, Transformer


class Shape(NamedTuple):
    """What all stages of a network share. time: width of the vector of the time; tokens: of the tokens; linear: see
    Transformer; scales: see Resnet."""

    groups: int
    eps: float
    time: int
    scales: bool
    linear: bool
    tokens: int


class Stage(nn.Module):
    """Resnets from `widths` to `out` channels, each followed, where `crossed`, by a transformer of (layers, heads)."""

    def __init__(self, shape: Shape, widths: list[int], out: int, crossed: tuple[int, int] | None) -> None:
        super().__init__()
        s = shape
        self.resnets = nn.ModuleList(Resnet(w, out, s.groups, s.eps, s.time, s.scales) for w in widths)
        depth, heads = crossed or (0, 0)
        rest = (out, s.groups, s.linear, depth, s.tokens, heads)
        self.attentions = nn.ModuleList(Transformer(*rest) for _ in (widths if crossed else ()))

    def block(self, i: int, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Resnet number i, and its transformer."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, tokens) if i < len(self.attentions) else x


class DownStage(Stage):
    """On the way down. `downsamplers` are given by the network."""

    downsamplers: nn.ModuleList

    def forward(
        self, x: Tensor, time: Tensor, tokens: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x, what every block and the downsampler gave). added: joins the last block where there are transformers, else what
        the stage gives (T2I-Adapter, Mou et al. 2023, arXiv 2302.08453, eq. 2, where diffusers' networks take it), or what it
        halves where only that has its size."""
        skips = []
        for i in range(len(self.resnets)):
            x = self.block(i, x, time, tokens)
            if added is not None and self.attentions and i == len(self.resnets) - 1:
                x = x + added
            skips.append(x)
        if added is not None and not self.attentions and self.downsamplers and added.shape[2:] == x.shape[2:]:
            x, added = x + added, None
            skips[-1:] = [x] if skips else []
        for down in self.downsamplers:
            x = down(x)
            skips.append(x)
        if added is not None and not self.attentions:
            x = x + added
            skips[-1:] = [x]
        return x, tuple(skips)


class MidStage(Stage):
    """At the smallest size: two blocks, the second without a transformer."""

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        """Both blocks."""
        for i in range(len(self.resnets)):
            x = self.block(i, x, time, tokens)
        return x


class UpStage(Stage):
    """On the way up. `upsamplers` are given by the network."""

    upsamplers: nn.ModuleList

    def forward(
        self, x: Tensor, skips: tuple[Tensor, ...], time: Tensor, tokens: Tensor, size: torch.Size | None = None
    ) -> Tensor:
        """skips: one for every block, the last one taken first. size: (H, W) to end with."""
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips[-1 - i]], dim=1), time, tokens)
        for up in self.upsamplers:
            x = up(x, size)
        return x
