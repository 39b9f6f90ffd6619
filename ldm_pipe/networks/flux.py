"""Flux: a transformer over packed latents, told the guidance scale (dev) or distilled to few steps (schnell).

Black Forest Labs 2024, https://github.com/black-forest-labs/flux; rectified flow with a shift that grows with the area, as in
Esser et al. 2024, arXiv 2403.03206, section 5.3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.parts import Made, Parts
from ldm_pipe.prompt import once
from ldm_pipe.text import ClipTower, MaskedTower, Words

WINDOW = 512  # tokens of T5
PATCH = 2


class Flux(nn.Module):
    """A FluxTransformer2DModel; its time is u. guidance: the scale where `cond.extras["guidance"]` [B] gives none."""

    def __init__(self, transformer: Any, guidance: float) -> None:
        super().__init__()
        self.transformer, self.guidance = transformer, guidance

    @property
    def embeds(self) -> bool:
        """Is the network told the guidance scale?"""
        return bool(self.transformer.config.guidance_embeds)

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W] with even sides, time [B] (u * 1000), tokens [B,L,D], pooled [B,P] -> [B,C,H,W]."""
        assert cond.tokens is not None
        assert cond.pooled is not None
        height, width = (side // PATCH for side in x.shape[-2:])
        scale = None
        if self.embeds:
            scale = cond.extras.get("guidance", x.new_full((len(x),), self.guidance, dtype=torch.float32)).to(x.dtype)
        out = self.transformer(
            hidden_states=packed(x),
            timestep=(time / 1000).to(x.dtype),
            guidance=scale,
            encoder_hidden_states=cond.tokens.to(x.dtype),
            pooled_projections=cond.pooled.to(x.dtype),
            txt_ids=x.new_zeros(cond.tokens.shape[1], 3),
            img_ids=places(height, width, x),
            return_dict=False,
        )[0]
        return unpacked(out, height, width)


def packed(x: Tensor) -> Tensor:
    """[B,C,H,W] -> [B, H/2 * W/2, 4C]: squares of two by two as one token."""
    b, c, h, w = x.shape
    squares = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH**2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse; height, width: of the grid of tokens."""
    squares = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, PATCH * height, PATCH * width)


def places(height: int, width: int, like: Tensor) -> Tensor:
    """[height * width, 3]: zero, row and column of every token."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([grid.new_zeros(len(grid), 1), grid], dim=1)


@dataclass(frozen=True, eq=False)
class FluxText:
    """The tokens of T5, and of CLIP the pooled vector alone."""

    clip: ClipTower
    t5: MaskedTower

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens [B,512,D], pooled [B,P]."""
        distinct, rows = once(prompts)
        tokens, _ = self.t5(distinct, masked=False)
        return Cond(tokens=tokens, pooled=self.clip.pooled(distinct)).take(rows)

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        return {"clip": self.clip.ids(prompts), "t5": self.t5.ids(prompts)[0]}

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return Cond(tokens=self.t5.encode(ids["t5"]), pooled=self.clip.encode(ids["clip"])[1])

    def chunks(self, prompt: Words) -> int:
        """One window, that of T5."""
        return 1

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for tokens beyond the window of T5."""
        return self.t5.notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> FluxText:
        """The same encoders elsewhere."""
        self.clip.to(device, dtype)
        self.t5.to(device, dtype)
        return self


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with CLIP and T5."""
    network = Flux(parts.network("transformer"), parts.guidance)
    text = FluxText(parts.clip(), parts.masked("_2", WINDOW))
    few = {} if network.embeds else {"steps": 4, "guidance_scale": 1.0}  # schnell
    return Made(network, text, parts.codec(), patch=PATCH, embeds=network.embeds, defaults=few)
