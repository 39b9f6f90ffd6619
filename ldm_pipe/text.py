"""Prompts to conditions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.tokens import Tokenizer


class TextEncoder(Protocol):
    """Prompts -> Cond with one row per prompt."""

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """Encode prompts, each once per call however often it occurs."""

    def notices(self, prompt: str) -> list[str]:
        """What a user should know of a prompt: words the model cannot know, tokens that were cut."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """The same encoder elsewhere."""


@dataclass(frozen=True, eq=False)
class ClipTower:
    """A CLIP text model with its tokenizer (Radford et al. 2021, arXiv 2103.00020): what families put their conditions
    together from. encoder: the light ClipTextModel or one of transformers, which are called alike."""

    encoder: Any
    tokenizer: Tokenizer

    @property
    def window(self) -> int:
        """Tokens of a prompt, the two ends included."""
        return int(self.encoder.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Any:
        """The model's whole output for prompts [B], the states of all layers included."""
        ids = torch.tensor(self.tokenizer([clean(p) for p in prompts], self.window), device=self.encoder.device)
        return self.encoder(ids, output_hidden_states=True)

    def states(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(tokens [B, window, width] before the last layer, pooled [B, width]); what SDXL and its successors take of a CLIP."""
        out = self(prompts)
        pooled = getattr(out, "text_embeds", None)
        return out.hidden_states[-2], out.pooler_output if pooled is None else pooled

    def over(self, prompt: str) -> int:
        """How many tokens of a prompt lie beyond the window, at least 0."""
        return max(0, self.tokenizer.length(clean(prompt)) - self.window)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        self.encoder.to(device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class MaskedTower:
    """A T5 (Raffel et al. 2019, arXiv 1910.10683) or Gemma text model with its tokenizer, filled up to `window` tokens on the
    right. lower: prompts are put into lower case and stripped first, as the model was trained."""

    encoder: Any
    tokenizer: Tokenizer
    window: int
    lower: bool = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], masked: bool = True, window: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens [B, window, width], mask [B, window], True = a token that counts). masked: the encoder sees the mask too."""
        texts = [self._text(p) for p in prompts]
        length = window or self.window
        ids = torch.tensor(self.tokenizer(texts, length), device=self.encoder.device)
        counts = torch.tensor([self.tokenizer.length(t) for t in texts], device=ids.device)
        mask = torch.arange(length, device=ids.device) < counts[:, None]
        out = self.encoder(ids, attention_mask=mask.long()) if masked else self.encoder(ids)
        return out.last_hidden_state, mask

    def _text(self, prompt: str) -> str:
        return clean(prompt).lower().strip() if self.lower else clean(prompt)

    def over(self, prompt: str) -> int:
        """How many tokens of a prompt lie beyond the window, at least 0."""
        return max(0, self.tokenizer.length(self._text(prompt)) - self.window)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        self.encoder.to(device=device, dtype=dtype)


def cut(over: int, window: int, of: str = "the encoder") -> list[str]:
    """The sentence for tokens that are not seen, where there are any."""
    return [f"the prompt is {over} token(s) longer than the {window} of {of}; the end is not seen"] if over else []


@dataclass(frozen=True, eq=False)
class ClipText:
    """CLIP's text model alone: its last hidden states are the condition (Stable Diffusion 1 and 2, the built-in model).

    words: what the model was taught, where that is a closed list (the built-in model); None for an open vocabulary.
    """

    encoder: Any
    tokenizer: Tokenizer
    words: frozenset[str] | None = None

    @property
    def _tower(self) -> ClipTower:
        return ClipTower(self.encoder, self.tokenizer)

    @property
    def window(self) -> int:
        """Tokens of a prompt, the two ends included."""
        return self._tower.window

    def __call__(self, prompts: Sequence[str]) -> Cond:
        """tokens: [B, window, width], in at least fp32's place of the encoder's dtype."""
        distinct, rows = once(prompts)
        return Cond(tokens=self._tower(distinct).last_hidden_state).take(rows)

    def notices(self, prompt: str) -> list[str]:
        """One sentence for unknown words, one for tokens beyond the window."""
        found = []
        known = self.words
        unknown = [w for w in plain_words(prompt) if w not in known] if known is not None else []
        if unknown:
            names = ", ".join(repr(w) for w in dict.fromkeys(unknown))
            found.append(f"this model does not know {names}; --model takes a larger one, --list words shows what it knows")
        return found + cut(self._tower.over(prompt), self.window)

    def to(self, device: torch.device, dtype: torch.dtype) -> ClipText:
        """The same encoder elsewhere."""
        self._tower.to(device, dtype)
        return self


def once(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """(the distinct prompts, which of them every prompt is), so that each is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    return distinct, [distinct.index(p) for p in prompts]


def plain_words(prompt: str) -> list[str]:
    """The words of a prompt in lower case, without the signs between them: what a model with a closed list knows or not."""
    return re.findall(r"[^\W_]+", prompt.lower())


def clean(prompt: str) -> str:
    """What a tokenizer can take: lone surrogates and NUL stand for nothing that was ever trained."""
    return prompt.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
