"""Sana: a linear transformer on latents of a 32-fold autoencoder, its text read by a small language model.

SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, Xie et al. 2024, arXiv 2410.10629,
section 2.
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
from ldm_pipe.text import MaskedTower, Words

WINDOW = 300
# The words that the published weights were trained with.
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
        "generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships "
        "to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully "
        "on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, "
        "a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or "
        "evaluations:",
        "User Prompt: ",
    )
)


class Sana(nn.Module):
    """A SanaTransformer2DModel; its time is u * 1000 times a factor of its own."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W], time [B], tokens [B,L,D], mask [B,L] -> [B,C,H,W]."""
        assert cond.tokens is not None
        assert cond.mask is not None
        return self.transformer(
            x,
            timestep=time * self.transformer.config.timestep_scale,
            encoder_hidden_states=cond.tokens.to(x.dtype),
            encoder_attention_mask=cond.mask.to(torch.int64),
            return_dict=False,
        )[0]


@dataclass(frozen=True, eq=False)
class SanaText:
    """The last states of Gemma for an instruction and the prompt: its first token, and the last 299.

    instruction: what the model was trained to have before every prompt (section 2.4 of the paper); a negative prompt has none.
    """

    gemma: MaskedTower
    instruction: str

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens [B,300,D], mask [B,300]."""
        if not self.instruction:
            return self.negative(prompts)
        distinct, rows = once([_read(p) for p in prompts])
        return _kept(*self.gemma(self._asked(distinct), window=self._length)).take(rows)

    @property
    def _length(self) -> int:
        """Tokens of the instruction and of a prompt behind it."""
        return self.gemma.tokenizer.length(self.instruction) + WINDOW - 2 if self.instruction else WINDOW

    def _asked(self, prompts: Sequence[Words]) -> list[Words]:
        return [self.instruction + p if isinstance(p, str) else p.after(self.instruction) for p in prompts]

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        read = self._asked([_read(p) for p in prompts])
        return dict(zip(("gemma", "mask"), self.gemma.ids(read, self._length), strict=True))

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return _kept(self.gemma.encode(ids["gemma"], ids["mask"]), ids["mask"])

    def negative(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """The same without the instruction."""
        distinct, rows = once([_read(p) for p in prompts])
        tokens, mask = self.gemma(distinct)
        return Cond(tokens=tokens, mask=mask).take(rows)

    def chunks(self, prompt: Words) -> int:
        """One window."""
        return 1

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for tokens beyond the window."""
        return self.gemma.notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> SanaText:
        """The same encoder elsewhere."""
        self.gemma.to(device, dtype)
        return self


def _kept(tokens: Tensor, mask: Tensor) -> Cond:
    """The first token, and the last 299."""
    length = tokens.shape[1]
    chosen = [0, *range(length - WINDOW + 1, length)]
    return Cond(tokens=tokens[:, chosen], mask=mask[:, chosen])


def _read(prompt: Words) -> Words:
    """In lower case and stripped."""
    return prompt.lower().strip() if isinstance(prompt, str) else prompt.lowered()


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with Gemma and the deep compression autoencoder."""
    transformer = parts.network("transformer")
    text = SanaText(parts.masked("", WINDOW), INSTRUCTION)
    return Made(Sana(transformer), text, parts.codec(), patch=transformer.config.patch_size)
