"""Where each token is looked at: cross-attention maps, averaged over heads, layers and steps.

What the DAAM: Interpreting Stable Diffusion Using Cross Attention, Tang et al. 2022, arXiv 2210.04885, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import Site, attention_rule
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """A Guide that watches one branch and changes no bit. size: (h, w) of x; sums: by size of the map, its sum and its count,
    begun anew with every denoiser that it makes."""

    network: nn.Module
    size: tuple[int, int]
    branch: str = "cond"
    sums: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)

    def __call__(self, denoise: Any) -> Any:
        """The denoiser, watched."""
        self.sums.clear()

        def watched(x: Tensor, level: Level) -> Any:
            with attention_rule(self.network, self._see):
                return denoise(x, level)

        return watched

    def _see(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        rows, shape = site.rows.of(self.branch), _shape(self.size, q.shape[2])
        if site.cross and rows is not None and shape is not None:
            maps = site.maps(q, k, rows).mean(1)  # [B,L,M]
            total, count = self.sums.get(shape, (torch.zeros_like(maps), 0))
            self.sums[shape] = total + maps, count + 1
        return out

    def maps(self) -> Tensor:
        """[B,M,h,w] at the size of x: how much each position looks at each of M tokens; they sum to 1 over the tokens. Raises
        UsageError where nothing was seen."""
        if not self.sums:
            raise UsageError("no cross-attention was seen: run the network first, or it has none")
        total: Tensor = sum((self._large(shape) for shape in self.sums), torch.zeros(()))
        return total / sum(count for _, count in self.sums.values())

    def _large(self, shape: tuple[int, int]) -> Tensor:
        total = self.sums[shape][0].mT
        total = total.reshape(*total.shape[:2], *shape)
        return F.interpolate(total, size=self.size, mode="bicubic", align_corners=False)


def of_words(maps: Tensor, spans: Mapping[str, range]) -> dict[str, Tensor]:
    """Maps [M,h,w] of tokens as maps [h,w] of words, each the mean of those of its tokens, from 0 to 1 each."""
    means = {word: maps[span.start : span.stop].mean(0) for word, span in spans.items() if len(span)}
    return {word: (m - m.min()) / (m.max() - m.min()).clamp_min(1e-12) for word, m in means.items()}


def _shape(size: tuple[int, int], length: int) -> tuple[int, int] | None:
    """The size of a map of so many positions: x halved some times, the odd ones rounded up."""
    height, width = size
    while height * width > length and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == length else None
