"""Stable Diffusion 3 and 3.5: a transformer over image and text together, on rectified flow.

Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, Esser et al. 2024, arXiv 2403.03206, section 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.parts import Made, Parts
from ldm_pipe.prompt import once
from ldm_pipe.text import ClipTower, MaskedTower, Words

WINDOW = 256  # tokens of T5


class SD3(nn.Module):
    """An SD3Transformer2DModel; its time is u * 1000."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W] with even sides, time [B], tokens [B,L,D], pooled [B,P] -> [B,C,H,W]."""
        assert cond.tokens is not None
        assert cond.pooled is not None
        given = {"encoder_hidden_states": cond.tokens.to(x.dtype), "pooled_projections": cond.pooled.to(x.dtype)}
        return self.transformer(hidden_states=x, timestep=time, return_dict=False, **given)[0]


@dataclass(frozen=True, eq=False)
class SD3Text:
    """Two CLIP towers side by side, filled up with zeros to `width`; behind them T5's tokens, zeros where it is left out."""

    clips: tuple[ClipTower, ...]
    t5: MaskedTower | None
    width: int

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens [B, chunks * 77 + 256, width], pooled [B, sum of the towers' widths]."""
        distinct, rows = once(prompts)
        long = None if self.t5 is None else self.t5(distinct, masked=False)[0]
        return self._joined([tower.states(distinct, chunks) for tower in self.clips], long).take(rows)

    def _joined(self, seen: Sequence[tuple[Tensor, Tensor]], long: Tensor | None) -> Cond:
        states, pooled = zip(*seen, strict=True)
        both = torch.cat(states, dim=-1)
        both = F.pad(both, (0, self.width - both.shape[-1]))
        long = both.new_zeros(len(both), WINDOW, self.width) if long is None else long
        return Cond(tokens=torch.cat([both, long], dim=1), pooled=torch.cat(pooled, dim=-1))

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        clips = {f"clip_{k}": tower.ids(prompts) for k, tower in enumerate(self.clips)}
        return clips if self.t5 is None else {**clips, "t5": self.t5.ids(prompts)[0]}

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        long = None if self.t5 is None else self.t5.encode(ids["t5"])
        return self._joined([tower.encode(ids[f"clip_{k}"]) for k, tower in enumerate(self.clips)], long)

    def chunks(self, prompt: Words) -> int:
        """How many windows of the CLIPs a prompt needs; T5 has one."""
        return max(clip.chunks(prompt) for clip in self.clips)

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for tokens that no tower sees, or, of a `Wording`, that T5 alone does not see."""
        return (self.t5 or self.clips[0]).notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> SD3Text:
        """The same encoders elsewhere."""
        for clip in self.clips:
            clip.to(device, dtype)
        if self.t5 is not None:
            self.t5.to(device, dtype)
        return self


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with two CLIP towers and, perhaps, T5."""
    transformer = parts.network("transformer")
    t5 = parts.masked("_3", WINDOW) if parts.has("text_encoder_3") else None
    text = SD3Text((parts.clip(), parts.clip("_2")), t5, transformer.config.joint_attention_dim)
    return Made(SD3(transformer), text, parts.codec(), patch=transformer.config.patch_size)
