"""Prompts to conditions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

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
class ClipText:
    """CLIP's text model (Radford et al. 2021, arXiv 2103.00020): the last hidden states of `window` tokens.

    encoder: the light ClipTextModel or that of transformers, which are called alike.
    words: what the model was taught, where that is a closed list (the built-in model); None for an open vocabulary.
    """

    encoder: Any
    tokenizer: Tokenizer
    words: frozenset[str] | None = None

    @property
    def window(self) -> int:
        """Tokens of a prompt, the two ends included."""
        return int(self.encoder.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Cond:
        """tokens: [B, window, width], in at least fp32's place of the encoder's dtype."""
        distinct = list(dict.fromkeys(prompts))
        rows = [distinct.index(p) for p in prompts]
        ids = torch.tensor(self.tokenizer([_clean(p) for p in distinct], self.window), device=self.encoder.device)
        return Cond(tokens=self.encoder(ids).last_hidden_state).take(rows)

    def notices(self, prompt: str) -> list[str]:
        """One sentence for unknown words, one for tokens beyond the window."""
        found = []
        known = self.words
        unknown = [w for w in _words(prompt) if w not in known] if known is not None else []
        if unknown:
            names = ", ".join(repr(w) for w in dict.fromkeys(unknown))
            found.append(f"this model does not know {names}; --model takes a larger one, --list words shows what it knows")
        over = self.tokenizer.length(_clean(prompt)) - self.window
        if over > 0:
            found.append(f"the prompt is {over} token(s) longer than the {self.window} of the encoder; the end is not seen")
        return found

    def to(self, device: torch.device, dtype: torch.dtype) -> ClipText:
        """The same encoder elsewhere."""
        self.encoder.to(device=device, dtype=dtype)
        return self


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+", prompt.lower())


def _clean(prompt: str) -> str:
    """What a tokenizer can take: lone surrogates and NUL stand for nothing that was ever trained."""
    return prompt.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")
