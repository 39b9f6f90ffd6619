"""PixArt: a diffusion transformer that attends to T5, or, as a training from scratch makes it, to one CLIP.

PixArt-alpha, Chen et al. 2023, arXiv 2310.00426, section 2.3; PixArt-sigma, Chen et al. 2024, arXiv 2403.04692.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.families import CLIP, class_of
from ldm_pipe.parts import Made, Parts
from ldm_pipe.prompt import once
from ldm_pipe.text import ClipText, MaskedTower, TextEncoder, Words

WINDOWS = {"PixArtAlphaPipeline": 120}  # tokens of T5 by the pipeline that the index names; else 300


class PixArt(nn.Module):
    """A PixArtTransformer2DModel; its time is the table's index. sized: it is told height, width and their ratio."""

    def __init__(self, transformer: Any, factor: int, sized: bool) -> None:
        super().__init__()
        self.transformer, self.factor, self.sized = transformer, factor, sized

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W] with even sides, time [B], tokens [B,L,D], mask [B,L] -> [B,2C,H,W], or [B,C,H,W] without a variance."""
        assert cond.tokens is not None
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            height, width = (side * self.factor for side in x.shape[-2:])
            added["resolution"] = x.new_tensor([height, width]).expand(len(x), -1)
            added["aspect_ratio"] = x.new_tensor([height / width]).expand(len(x), -1)
        return self.transformer(
            x,
            timestep=time,
            encoder_hidden_states=cond.tokens.to(x.dtype),
            encoder_attention_mask=cond.mask,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


@dataclass(frozen=True, eq=False)
class PixArtText:
    """The tokens of T5 with their mask."""

    t5: MaskedTower

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens [B,L,D], mask [B,L]."""
        distinct, rows = once(prompts)
        tokens, mask = self.t5(distinct)
        return Cond(tokens=tokens, mask=mask).take(rows)

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        return dict(zip(("t5", "mask"), self.t5.ids(prompts), strict=True))

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return Cond(tokens=self.t5.encode(ids["t5"], ids["mask"]), mask=ids["mask"])

    def chunks(self, prompt: Words) -> int:
        """One window."""
        return 1

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for tokens beyond the window."""
        return self.t5.notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> PixArtText:
        """The same encoder elsewhere."""
        self.t5.to(device, dtype)
        return self


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with T5 alone, or with a CLIP whose every token is seen, as U-Nets see it."""
    transformer, codec = parts.network("transformer"), parts.codec()
    network = PixArt(transformer, codec.factor, transformer.adaln_single.emb.use_additional_conditions)
    text: TextEncoder
    if class_of(parts.index, "text_encoder") in CLIP:
        tower = parts.clip()
        text = ClipText(tower.encoder, tower.tokenizer, frozenset(parts.words) or None)
    else:
        window = WINDOWS.get(str(parts.index.get("_class_name")), 300)
        text = PixArtText(replace(parts.masked("", window), lower=True))
    return Made(network, text, codec, patch=transformer.config.patch_size)
