"""Textual inversion embeddings: learned words from a file into a copy of a model.

An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, Gal et al. 2022, arXiv 2208.01618,
section 4. Layouts: AUTOMATIC1111's (`emb_params`), diffusers' (the word is the tensor's name), and of SDXL's two towers
(`clip_l`, `clip_g`). A word of several vectors stands for as many tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.loading import Bundle
from ldm_pipe.lora import copied, read
from ldm_pipe.text import ClipTower
from ldm_pipe.tokens import ClipTokenizer, FromTransformers, Tokenizer

A1111, TOWERS = "emb_params", ("clip_l", "clip_g")


@dataclasses.dataclass(frozen=True, eq=False)
class Worded:
    """A tokenizer that writes learned words of several vectors out. words: word -> the tokens that it stands for."""

    inner: Tokenizer
    words: Mapping[str, str]

    def __call__(self, prompts: Sequence[str], window: int) -> list[list[int]]:
        """Rows of `window` ids."""
        return self.inner([self._spelled(p) for p in prompts], window)

    def length(self, prompt: str) -> int:
        """Ids of the whole prompt."""
        return self.inner.length(self._spelled(prompt))

    def starts(self, prompt: str) -> list[int]:
        """Where the ids begin in the prompt as it was given; those of a learned word, at the word."""
        places = list(range(len(prompt)))
        for word, tokens in self.words.items():
            made, last = list[int](), 0
            for found in _standing(word).finditer(prompt):
                made += [*places[last : found.start()], *[places[found.start()]] * len(tokens)]
                last = found.end()
            prompt, places = self._written(word, prompt), made + places[last:]
        return [places[start] if start >= 0 else start for start in self.inner.starts(prompt)]

    def _spelled(self, prompt: str) -> str:
        for word in self.words:
            prompt = self._written(word, prompt)
        return prompt

    def _written(self, word: str, prompt: str) -> str:
        return _standing(word).sub(lambda m: self.words[word], prompt)


def _standing(word: str) -> re.Pattern[str]:
    """Where a learned word stands in a prompt."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags=re.IGNORECASE)


def learn(bundle: Bundle, file: Path, word: str = "") -> tuple[Bundle, str]:
    """(a copy of the bundle that knows the word of a file, a sentence that says so). word: instead of the file's own.

    Raises ModelError where the file is of no known layout or for another model, UsageError where the word is known already.
    """
    tensors, _ = read(file)
    rows, own = _rows(tensors, file)
    return taught(bundle, word or own, rows, file.name)


def taught(bundle: Bundle, word: str, rows: Sequence[Tensor], where: str) -> tuple[Bundle, str]:
    """The same from vectors, [n, width] for each text encoder of CLIP's kind."""
    if not word.strip() or len(word) > 80:
        raise UsageError(f"{where}: the word takes 1 to 80 characters, got {word!r:.100}")
    mine = copied(bundle)
    held = towers(mine.text)
    widths = [int(table(t.encoder).weight.shape[1]) for t in held]
    if [r.shape[1] for r in rows] != widths:
        of, wanted = (" and ".join(map(str, w)) for w in ([r.shape[1] for r in rows], widths))
        raise ModelError(f"{where}: its vectors have width {of}, the text encoder of this model takes {wanted or 'none'}")
    names = [word, *(f"{word}_{k}" for k in range(1, len(rows[0])))]
    changed = {id(t.tokenizer): _teach(t, names, r, where) for t, r in zip(held, rows, strict=True)}
    text = _retokenized(mine.text, changed)
    if getattr(text, "words", None):
        text = dataclasses.replace(text, words=text.words | set(re.findall(r"[^\W_]+", " ".join(names).lower())))
    return dataclasses.replace(mine, text=text), f"{where}: {word!r} is a word of {len(names)} vector(s)"


def _rows(tensors: Mapping[str, Tensor], file: Path) -> tuple[list[Tensor], str]:
    """(vectors for each tower, the word)."""
    if set(tensors) == set(TOWERS):
        found, word = [tensors[n] for n in TOWERS], file.stem
    elif len(tensors) == 1:
        name, tensor = next(iter(tensors.items()))
        found, word = [tensor], file.stem if name == A1111 else name
    else:
        raise ModelError(f"{file.name} holds {len(tensors)} tensors; an embedding holds one, or {' and '.join(TOWERS)}")
    rows = [t[None] if t.ndim == 1 else t for t in found]
    if any(t.ndim != 2 or not 1 <= len(t) <= 75 or len(t) != len(rows[0]) for t in rows):
        raise ModelError(f"{file.name}: an embedding holds 1 to 75 vectors, got shape {tuple(rows[0].shape)}")
    return rows, word


def towers(text: Any) -> list[ClipTower]:
    """The CLIP towers of a text encoder, in their order."""
    if hasattr(text, "encoder"):
        return [ClipTower(text.encoder, text.tokenizer)]
    values = [getattr(text, f.name) for f in dataclasses.fields(text)]
    return [t for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, ClipTower)]


def table(encoder: nn.Module) -> Any:
    """The module that holds the vectors of all tokens."""
    return next(m for n, m in encoder.named_modules() if n.endswith("token_embedding"))


def _teach(tower: ClipTower, names: Sequence[str], rows: Tensor, where: str) -> Tokenizer:
    """Add tokens and their vectors to a tower, in place; the tokenizer that knows them."""
    inner = tower.tokenizer
    while isinstance(inner, Worded):
        inner = inner.inner
    ids = _added(inner, names, where)
    held = table(tower.encoder)
    old = held.weight.detach()
    size = max(len(old), max(ids) + 1)
    new = torch.cat([old, old.new_zeros(size - len(old), old.shape[1])])
    new[ids] = rows.to(old)
    held.weight, held.num_embeddings = nn.Parameter(new, requires_grad=False), size
    words = tower.tokenizer.words if isinstance(tower.tokenizer, Worded) else {}
    return Worded(inner, {**words, names[0]: " ".join(names)}) if len(names) > 1 else tower.tokenizer


def _added(tokenizer: Tokenizer, names: Sequence[str], where: str) -> list[int]:
    """The ids of new tokens."""
    from tokenizers import AddedToken

    new = [AddedToken(n, single_word=n[0].isalnum() and n[-1].isalnum(), normalized=True) for n in names]
    if isinstance(tokenizer, ClipTokenizer):
        known = tokenizer.encoder.get_vocab(with_added_tokens=True)
        taken = [n for n in names if n in known or f"{n}</w>" in known]
    elif isinstance(tokenizer, FromTransformers):
        known = tokenizer.tokenizer.get_vocab()
        taken = [n for n in names if n in known or f"{n}</w>" in known]
    else:
        raise UsageError(f"{where}: this model's tokenizer takes no new words")
    if taken:
        raise UsageError(f"{where}: {taken[0]!r} is a token of the model already; give another word as FILE:<word>")
    if isinstance(tokenizer, ClipTokenizer):
        tokenizer.encoder.add_tokens(new)
        return [tokenizer.encoder.token_to_id(n) for n in names]
    tokenizer.tokenizer.add_tokens(new)
    return list(tokenizer.tokenizer.convert_tokens_to_ids(list(names)))


def _retokenized(text: Any, changed: Mapping[int, Tokenizer]) -> Any:
    """The text encoder with other tokenizers, by the identity of those that they replace."""
    if isinstance(text, tuple):
        return tuple(_retokenized(t, changed) for t in text)
    if not dataclasses.is_dataclass(text) or isinstance(text, type):
        return text
    found = {f.name: getattr(text, f.name) for f in dataclasses.fields(text)}
    new = {n: changed[id(v)] if id(v) in changed else _retokenized(v, changed) for n, v in found.items()}
    return dataclasses.replace(text, **{n: v for n, v in new.items() if v is not found[n]})
