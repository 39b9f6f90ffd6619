"""The words of the world, and a CLIP tokenizer in which each of them is one token."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from train.world.scenes import COLOURS, NUMBERS
from train.world.sprites import objects, plural

FRAME = ("a", "an", "on", "with", "of", "to", "the", "picture", "background", "left", "right", "above", "below")


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word of the captions of training scenes (the held-out objects' names are not among them)."""
    names = {w for n in objects() for w in (n, plural(n))}
    return tuple(sorted(names | set(COLOURS) | set(NUMBERS.values()) | set(FRAME)))


@cache
def make_tokenizer(window: int) -> Any:
    """A transformers CLIPTokenizer: byte-pair merges trained on `vocabulary()` until each word is one token.

    Unknown words fall into pieces, down to bytes, as in any CLIP tokenizer. window: tokens of a prompt, ends included.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(vocabulary())], trainer)
    learned = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in learned]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=window)


@cache
def read_tokenizer(folder: str) -> Any:
    """The CLIPTokenizer of a model folder, read once."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write `folder` in the new layout (tokenizer.json) and in the old one (vocab.json, merges.txt)."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
