"""DiT: a transformer told a class instead of a text.

Scalable Diffusion Models with Transformers, Peebles and Xie 2022, arXiv 2212.09748, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.parts import Made, Parts
from ldm_pipe.prompt import Words, spelled


class DiT(nn.Module):
    """A DiTTransformer2DModel; its time is the table's index."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W], time [B], extras["label"] [B] whole numbers -> [B,2C,H,W], or [B,C,H,W] without a variance."""
        return self.transformer(x, timestep=time, class_labels=cond.extras["label"], return_dict=False)[0]


@dataclass(frozen=True, eq=False)
class Labels:
    """Classes in the place of prompts: a number, or a name that the folder gives one; an empty prompt is no class."""

    names: Mapping[str, int]
    count: int
    device: torch.device | str = "cpu"

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """extras["label"]: [B], `count` for no class. Raises UsageError naming what is allowed."""
        return Cond(extras={"label": torch.tensor([self._label(spelled(p).strip()) for p in prompts], device=self.device)})

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`: the labels themselves."""
        return {"label": torch.tensor([self._label(p.strip()) for p in prompts])}

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return Cond(extras=dict(ids))

    def chunks(self, prompt: Words) -> int:
        """None: a name may hold brackets."""
        return 0

    def _label(self, prompt: str) -> int:
        if not prompt:
            return self.count
        if prompt.isascii() and prompt.isdecimal() and len(prompt) < 10 and int(prompt) < self.count:
            return int(prompt)
        if prompt.lower() in self.names:
            return self.names[prompt.lower()]
        listed = f"a class of this model, which takes 0 to {self.count - 1}"
        if not self.names:
            raise UsageError(f"{prompt!r:.60} is not {listed}")
        near = unknown("class", prompt, self.names)
        raise UsageError(f"{prompt!r:.60} is not {listed} or a name:{near.partition(';')[2].partition(' Choose')[0][:80]}")

    def notices(self, prompt: Words) -> list[str]:
        """Nothing: a class is known or refused."""
        return []

    def to(self, device: torch.device, dtype: torch.dtype) -> Labels:
        """The same labels elsewhere."""
        return Labels(self.names, self.count, device)


def assemble(parts: Parts) -> Made:
    """The bundle of a folder without a text encoder; its index may name the classes ("id2label")."""
    transformer, listed = parts.network("transformer"), parts.index.get("id2label")
    pairs = listed.items() if isinstance(listed, dict) else ()
    names = {name.strip().lower(): int(i) for i, text in pairs if str(i).isdecimal() for name in str(text).split(",")}
    labels = Labels(names, transformer.config.num_embeds_ada_norm)
    return Made(DiT(transformer), labels, parts.codec(), patch=transformer.config.patch_size)
