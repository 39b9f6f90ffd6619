"""Textual inversion: a new word for what a few pictures show; nothing learns but its vectors.

An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, Gal et al. 2022, arXiv 2208.01618,
section 4: learning rate 5e-3 (of one picture), 5000 steps, begun with the vector of a known word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import embedding, loading, tokens
from ldm_pipe.errors import UsageError
from train.adapting import Rows
from train.data.dataset import Data, Seen
from train.data.order import stream
from train.tasks.lora import Adapting

A1111, DIFFUSERS = "a1111.safetensors", "learned_embeds.safetensors"
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of my {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a good photo of the {}", "a photo of one {}",
)  # fmt: skip


@dataclass(frozen=True)
class TextualInversion(Adapting):
    """Trains the vectors of a new word; the fields are those of the task finetune, of which no network learns.

    word: the new one, such as "<toy>". vectors: how many tokens it stands for. begin: a known word of one token whose vector
    they begin with. templates: the captions, {} is the word; pictures that have a caption of their own with the word keep it.
    """

    shows: ClassVar[bool] = False  # a word has nothing to tell of a picture that is shown

    train_network: bool = False
    train_text: bool = True
    word: str = "<new>"
    vectors: int = 1
    begin: str = "object"
    templates: tuple[str, ...] = TEMPLATES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_network or not self.train_text:
            raise UsageError("textual_inversion trains the word alone: train_network is false and train_text true")
        if not 1 <= self.vectors <= 75:
            raise UsageError(f"vectors is {self.vectors}; it takes 1 to 75")
        if not self.templates or any("{}" not in t for t in self.templates):
            raise UsageError("templates takes captions with {} where the word stands")

    @cached_property
    def settings(self) -> Data:
        """The [data] table; captions are not needed."""
        return replace(super().settings, allow_missing=True)

    @cached_property
    def bundle(self) -> Any:
        """The model, loaded, with the word in it."""
        plain = loading.load(self.model)
        rows = begun(plain, self.begin).expand(self.vectors, -1)
        return embedding.taught(plain, self.word, [rows], "task.word")[0]

    def branches(self) -> dict[str, nn.Module]:
        """The vectors."""
        return {"word": placed(self, self.word, self.vectors)}

    def said(self, seed: int, seen: Seen) -> str:
        """The picture's own caption where it holds the word, else a template."""
        return with_word(self.word, self.templates, seed, seen)

    def export(self, net: Any, folder: Path) -> None:
        """The vectors as AUTOMATIC1111 and as diffusers keep them."""
        write(self.word, net.branches["word"].rows, folder)


def begun(bundle: Any, word: str) -> Tensor:
    """The vector [1,width] of a known word. Raises UsageError where it is not one token, or the model has no single CLIP."""
    if not hasattr(bundle.text, "encoder"):
        raise UsageError("a word is learned by models with a single CLIP")
    spans = tokens.places(bundle.text.tokenizer, bundle.text.window, word)
    if len(spans) != 1 or len(spans[0][1]) != 1:
        raise UsageError(f"begin is {word!r}; it takes a word that is one token of this model")
    known = bundle.text.words
    if known is not None and word.lower() not in known:
        raise UsageError(f"begin is {word!r}, which this model does not know; --list words shows what it knows")
    place = int(bundle.text.tokenizer([word], bundle.text.window)[0][spans[0][1][0]])
    row: Tensor = embedding.table(bundle.text.encoder).weight[place].detach().clone()
    return row[None]


def placed(task: Any, word: str, vectors: int) -> Rows:
    """The rows of a word in the table of the task's text encoder, in their place; the handle goes to the task's."""
    encoder, tokenizer = task.bundle.text.encoder, task.bundle.text.tokenizer
    ids = tokenizer([word], task.bundle.text.window)[0][1 : 1 + vectors]
    table = embedding.table(encoder)
    rows = Rows(table.weight[torch.tensor(ids)].detach(), ids)
    task.handles.append(rows.beside(table))
    return rows


def with_word(word: str, templates: tuple[str, ...], seed: int, seen: Seen) -> str:
    """What a visit is trained with: its caption where that holds the word, else one of the templates."""
    if word in seen.caption:
        return seen.caption
    rng = stream(seed, "template", seen.row, seen.visit)
    return templates[int(rng.integers(len(templates)))].replace("{}", word)


def write(word: str, rows: Tensor, folder: Path, mark: str = "") -> None:
    """Vectors [n,width] in both layouts. mark: behind the names of the files."""
    for file, name in ((A1111, "emb_params"), (DIFFUSERS, word)):
        path = folder / file
        save_file({name: rows.detach().cpu().clone().contiguous()}, path.with_stem(path.stem + mark))
