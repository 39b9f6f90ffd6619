"""Stable Diffusion XL, base and refiner: two text towers, and sizes as conditions.

SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis, Podell et al. 2023, arXiv 2307.01952, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.networks.unet import UNet, inserted
from ldm_pipe.parts import Made, Parts
from ldm_pipe.prompt import once, spelled
from ldm_pipe.text import ClipTower, Words

LIKED, DISLIKED = 6.0, 2.5  # the aesthetic scores that the refiner is told of what is wanted and of what is not


class SDXL(UNet):
    """The U-Net, told the pooled prompt and six sizes: of the picture before it was cut, where it was cut, and of the result.

    By default nothing was cut and the picture has the size of the result; `cond.extras["sizes"]` [B,6] says otherwise. The
    refiner is told an aesthetic score `cond.extras["score"]` [B,1] in the place of the last two.
    """

    def added(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """Pooled text [B,D] and sizes [B,6], or [B,5] with a score."""
        assert cond.pooled is not None
        height, width = (side * self.factor for side in x.shape[-2:])
        sizes = cond.extras.get("sizes", x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1))
        if "score" in cond.extras:
            sizes = torch.cat([sizes[:, :4], cond.extras["score"].to(sizes)], dim=1)
        return {"added_cond_kwargs": {"text_embeds": cond.pooled.to(x.dtype), "time_ids": sizes.to(x.dtype)}}


@dataclass(frozen=True, eq=False)
class SDXLText:
    """The states before the last layer of every tower side by side, and the pooled vector of the last one.

    zeros: an empty negative prompt stands for no condition at all, as in training. scored: aesthetic scores go with it.
    """

    towers: tuple[ClipTower, ...]
    zeros: bool
    scored: bool

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens [B, chunks * window, sum of the widths], pooled [B,D]."""
        return self._encoded(prompts, chunks, LIKED)

    def negative(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """The same for what is to be moved away from."""
        cond = self._encoded(prompts, chunks, DISLIKED)
        if not self.zeros:
            return cond
        assert cond.tokens is not None
        assert cond.pooled is not None
        kept = torch.tensor([spelled(p) != "" for p in prompts], device=cond.pooled.device)
        return Cond(tokens=cond.tokens * kept[:, None, None], pooled=cond.pooled * kept[:, None], extras=cond.extras)

    def _encoded(self, prompts: Sequence[Words], chunks: int, score: float) -> Cond:
        distinct, rows = once(prompts)
        return self._joined([tower.states(distinct, chunks) for tower in self.towers], score).take(rows)

    def _joined(self, seen: Sequence[tuple[Tensor, Tensor]], score: float) -> Cond:
        states, pooled = zip(*seen, strict=True)
        scores = {"score": states[0].new_full((len(states[0]), 1), score)} if self.scored else {}
        return Cond(tokens=torch.cat(states, dim=-1), pooled=pooled[-1], extras=scores)

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        return {f"clip_{k}": tower.ids(prompts) for k, tower in enumerate(self.towers)}

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return self._joined([tower.encode(ids[f"clip_{k}"]) for k, tower in enumerate(self.towers)], LIKED)

    def chunks(self, prompt: Words) -> int:
        """How many windows a prompt needs."""
        return max(tower.chunks(prompt) for tower in self.towers)

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for tokens that are not seen."""
        return self.towers[-1].notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> SDXLText:
        """The same encoder elsewhere."""
        for tower in self.towers:
            tower.to(device, dtype)
        return self


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with two CLIP towers, or with the second alone (the refiner)."""
    codec = parts.codec()
    network = SDXL(parts.network("unet"), parts.guidance, codec.factor)
    towers = tuple(parts.clip(suffix) for suffix in ("", "_2") if parts.has(f"text_encoder{suffix}"))
    zeros, scored = (bool(parts.index.get(n)) for n in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"))
    inserts = inserted(network.unet, codec.channels)
    return Made(network, SDXLText(towers, zeros, scored), codec, embeds=network.embeds, inserts=inserts)
