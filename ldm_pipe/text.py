"""Prompts to conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.emphasis import emphasised
from ldm_pipe.prompt import Wording, once, plain_words, spelled
from ldm_pipe.prompt import Words as Words  # part of what this module offers, as is `clean`
from ldm_pipe.prompt import clean as clean
from ldm_pipe.tokens import Tokenizer, spans, weighed
from ldm_pipe.windows import MOST_CHUNKS, Chunk, Piece, cut, pieces, placed


class TextEncoder(Protocol):
    """Prompts -> Cond with one row per prompt."""

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """Encode prompts, each once per call however often it occurs. A text is cut at the encoder's window; a `Wording` takes
        as many windows as it needs, where the encoder has several. chunks: fill all up to so many with empty ones."""

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Plain prompts, cut at the window, as tensors of B rows on the CPU: what `encode` reads, by name."""

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """What calling the encoder gives of the same prompts, with gradients for weights that ask for them."""

    def chunks(self, prompt: Words) -> int:
        """How many windows a prompt needs; 0 where prompts are names that hold no grammar."""

    def notices(self, prompt: Words) -> list[str]:
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
    def states(self, prompts: Sequence[Words], chunks: int = 1, last: bool = False) -> tuple[Tensor, Tensor]:
        """(tokens [B, chunks * window, width], pooled [B, width] of the first chunk). tokens: the states before the last layer,
        which SDXL and its successors take of a CLIP, or the `last` ones, normalised; times the weights (`emphasised`)."""
        rows = [self._rows(prompt) for prompt in prompts]
        chunks = max([chunks, *map(len, rows)])
        blank = (self.tokenizer([""], self.window)[0], [1.0] * self.window)
        whole = [row for filled in rows for row in [*filled, *[blank] * (chunks - len(filled))]]
        found, pooled = self.encode(torch.tensor([ids for ids, _ in whole], device=self.encoder.device), last)
        tokens = emphasised(found, torch.tensor([weights for _, weights in whole]))
        return tokens.reshape(len(prompts), -1, tokens.shape[-1]), pooled[::chunks]

    @torch.no_grad()
    def pooled(self, prompts: Sequence[Words]) -> Tensor:
        """The pooled vectors [B, width] alone, of the first chunks."""
        return self.encode(torch.tensor([self._rows(p)[0][0] for p in prompts], device=self.encoder.device))[1]

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Plain prompts as [B, window]."""
        return torch.tensor(self.tokenizer([clean(p) for p in prompts], self.window))

    def encode(self, ids: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        """ids [B,L] -> (tokens [B,L,width], pooled [B,width]) as `states` takes them, with gradients."""
        out = self.encoder(ids, output_hidden_states=True)
        return out.last_hidden_state if last else out.hidden_states[-2], _pooled(out)

    def chunks(self, prompt: Words) -> int:
        """How many windows a prompt needs."""
        return 1 if isinstance(prompt, str) else min(MOST_CHUNKS, len(self._pieces(prompt)))

    def _rows(self, prompt: Words) -> list[tuple[list[int], list[float]]]:
        """(ids, weights) of every window that a prompt needs."""
        if isinstance(prompt, str):
            return [(self.tokenizer([clean(prompt)], self.window)[0], [1.0] * self.window)]
        empty, found = self.tokenizer([""], self.window)[0], []
        for piece in self._pieces(prompt)[:MOST_CHUNKS]:
            rest = self.window - 1 - len(piece)
            ids, weights = [empty[0], *(p.id for p in piece)], [1.0, *(p.weight for p in piece)]
            found.append(([*ids, *empty[1 : 1 + rest]], weights + [1.0] * rest))
        return found

    def _chunks(self, prompt: Wording) -> list[Chunk]:
        texts = [clean("".join(run.text for run in runs)) for runs in prompt.chunks]
        return [(text, weighed(self.tokenizer, text, runs)) for text, runs in zip(texts, prompt.chunks, strict=True)]

    def _pieces(self, prompt: Wording) -> list[list[Piece]]:
        return pieces(self._chunks(prompt), self.window - 2)

    def places(self, prompt: Words) -> list[tuple[str, Sequence[int]]]:
        """The words of a prompt in order, each with its places among the tokens of all windows; none where it is not seen."""
        if isinstance(prompt, str):
            return [*spans(self.tokenizer, self.window, clean(prompt))]
        return [*placed(self._chunks(prompt), self.window)]

    def over(self, prompt: Words) -> int:
        """How many tokens of a prompt are not seen, at least 0."""
        if isinstance(prompt, str):
            return max(0, self.tokenizer.length(clean(prompt)) - self.window)
        return sum(len(piece) for piece in self._pieces(prompt)[MOST_CHUNKS:])

    def notices(self, prompt: Words) -> list[str]:
        """A sentence where tokens are not seen."""
        return cut(self.over(prompt), self.window if isinstance(prompt, str) else MOST_CHUNKS * (self.window - 2))

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
    def __call__(self, prompts: Sequence[Words], masked: bool = True, window: int | None = None) -> tuple[Tensor, Tensor]:
        """(tokens [B, window, width], mask [B, window], True = a token that counts). masked: the encoder sees the mask too.
        A `Wording` is one text here, whatever its chunks; its weights act as in `emphasised`."""
        ids, mask = (t.to(self.encoder.device) for t in self.ids(prompts, window))
        found = self.encode(ids, mask if masked else None)
        weights = torch.tensor([self._weights(self._read(p), ids.shape[1]) for p in prompts])
        return emphasised(found, weights), mask.to(found.device)

    def ids(self, prompts: Sequence[Words], window: int | None = None) -> tuple[Tensor, Tensor]:
        """(ids, mask), both [B, window]: the words of prompts without their weights."""
        read = [self._read(p) for p in prompts]
        texts = [p if isinstance(p, str) else clean(p.text) for p in read]
        length = window or self.window
        counts = torch.tensor([self.tokenizer.length(t) for t in texts])
        return torch.tensor(self.tokenizer(texts, length)), torch.arange(length) < counts[:, None]

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [B,L], and a mask where the encoder sees one -> tokens [B,L,D], with gradients."""
        out = self.encoder(ids) if mask is None else self.encoder(ids, attention_mask=mask.long())
        found: Tensor = out.last_hidden_state
        return found

    def _read(self, prompt: Words) -> Words:
        """The prompt as the model takes it, in one piece."""
        if isinstance(prompt, Wording):
            return prompt.lowered() if self.lower else prompt.joined
        return clean(prompt).lower().strip() if self.lower else clean(prompt)

    def places(self, prompt: Words) -> list[tuple[str, Sequence[int]]]:
        """The words of a prompt in order, each with its places among the tokens; none where it is not seen."""
        return [*spans(self.tokenizer, self.window, clean(spelled(self._read(prompt))))]

    def _weights(self, prompt: Words, length: int) -> list[float]:
        if isinstance(prompt, str):
            return [1.0] * length
        found = [weight for _, weight, _ in weighed(self.tokenizer, clean(prompt.text), prompt.chunks[0])]
        return (found if len(found) <= length else [*found[: length - 1], 1.0]) + [1.0] * (length - len(found))

    def over(self, prompt: Words) -> int:
        """How many tokens of a prompt lie beyond the window, at least 0."""
        read = self._read(prompt)
        return max(0, self.tokenizer.length(read if isinstance(read, str) else clean(read.text)) - self.window)

    def notices(self, prompt: Words) -> list[str]:
        """A sentence where tokens are not seen."""
        return cut(self.over(prompt), self.window)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights."""
        self.encoder.to(device=device, dtype=dtype)


def _pooled(out: Any) -> Tensor:
    found = getattr(out, "text_embeds", None)
    return out.pooler_output if found is None else found


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

    def __call__(self, prompts: Sequence[Words], chunks: int = 1) -> Cond:
        """tokens: [B, chunks * window, width], in at least fp32's place of the encoder's dtype."""
        distinct, rows = once(prompts)
        return Cond(tokens=self._tower.states(distinct, chunks, last=True)[0]).take(rows)

    def ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """As of `TextEncoder`."""
        return {"clip": self._tower.ids(prompts)}

    def encode(self, ids: Mapping[str, Tensor]) -> Cond:
        """As of `TextEncoder`."""
        return Cond(tokens=self._tower.encode(ids["clip"], last=True)[0])

    def chunks(self, prompt: Words) -> int:
        """How many windows a prompt needs."""
        return self._tower.chunks(prompt)

    def places(self, prompt: Words) -> list[tuple[str, Sequence[int]]]:
        """As of `ClipTower`."""
        return self._tower.places(prompt)

    def notices(self, prompt: Words) -> list[str]:
        """One sentence for unknown words, one for tokens that are not seen."""
        found = []
        known = self.words
        unknown = [w for w in plain_words(spelled(prompt)) if w not in known] if known is not None else []
        if unknown:
            names = ", ".join(repr(w) for w in dict.fromkeys(unknown))
            found.append(f"this model does not know {names}; --model takes a larger one, --list words shows what it knows")
        return found + self._tower.notices(prompt)

    def to(self, device: torch.device, dtype: torch.dtype) -> ClipText:
        """The same encoder elsewhere."""
        self._tower.to(device, dtype)
        return self
