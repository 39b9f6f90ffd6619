"""Several concepts of Custom Diffusion made one file: `python -m train concepts --concept FOLDER="a <toy> fox" ... -o FILE`.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, eq. 4: for the words of each
concept the keys and values are those of its own training; elsewhere they change as little as can be on given captions. Here
by default that is weighed, not forced: what a network attends to after the caption's end tells of the word too, and so many
tokens cannot all be met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_pipe import embedding, files, loading, lora
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train.tasks.custom_diffusion import DIFFERENCES, merged, weighed
from train.tasks.textual_inversion import DIFFUSERS


def concepts(
    model: str, given: Sequence[str], captions: str, output: Path, weight: float = 3.0, ridge: float = 0.0
) -> list[str]:
    """Merge exports of the task custom_diffusion, each "FOLDER=CAPTION" with its word in the caption; a folder that is given
    again has more captions.

    captions: a file of captions, one a line, on which the least changes. weight: of the concepts' tokens, from the word on to
    the last that the network reads, where those of the captions count 1 (`weighed`); inf: eq. 4 exactly, on the tokens from
    the word to its caption's end (`merged`). ridge: is added to the Gram matrix; above 0 where captions are few. Returns how
    the result is used. Raises UsageError on what is missing or does not fit.
    """
    if not weight > 0 or ridge < 0:
        raise UsageError("--weight takes more than 0, or inf; --ridge takes 0 or more")
    told = _told(given)
    bundle = plain = loading.load(loading.BUILTIN if model == "builtin" else model)
    for folder in told:
        bundle, _ = embedding.learn(bundle, folder / DIFFUSERS)
    network, exact = lora.parts(plain)[NETWORK], math.isinf(weight)
    targets = dict[str, list[tuple[Tensor, Tensor]]]()
    for folder, said in told.items():
        tokens = torch.cat([of_word(bundle, _word(folder), caption, exact) for caption in said])
        for (_, layer), leaves in lora.opened({NETWORK: network}, folder / DIFFERENCES)[0].items():
            own = cast(Tensor, network.get_submodule(layer).weight).detach() + leaves["whole"]
            targets.setdefault(layer, []).append((tokens, own))
    regular, tensors = of_captions(bundle, _lines(captions), exact), dict[str, Tensor]()
    for layer, several in targets.items():
        plainly = cast(Tensor, network.get_submodule(layer).weight).detach()
        new = merged(plainly, several, regular, ridge) if exact else weighed(plainly, several, regular, weight, ridge)
        tensors[f"lora_unet_{layer.replace('.', '_')}.diff"] = (new - plainly.double()).float().contiguous()
    files.write(output, save(tensors, metadata={"format": "pt"}))
    words = " ".join(f"--embedding {folder / DIFFUSERS}" for folder in told)
    return [f"--lora {output} {words}"]


def _told(given: Sequence[str]) -> dict[Path, list[str]]:
    """The captions of every export, checked."""
    told = dict[Path, list[str]]()
    for text in given:
        export, _, caption = text.partition("=")
        told.setdefault(Path(export), []).append(caption.strip())
    if len(told) < 2 or not all(all(said) for said in told.values()):
        raise UsageError('concepts takes --concept FOLDER="a caption with the word" of two folders or more')
    for folder in told:
        missing = [n for n in (DIFFERENCES, DIFFUSERS) if not (folder / n).is_file()]
        if missing:
            raise UsageError(f"--concept {str(folder)!r:.120} has no {missing[0]}; it takes an export of custom_diffusion")
    return told


def of_word(bundle: Any, word: str, caption: str, exact: bool = False) -> Tensor:
    """The text's features [n,d] from a word on: to the last that the network reads, or exactly to the caption's last word.
    Raises UsageError where the word is not in the caption."""
    text = bundle.text
    ids, first = (text.tokenizer([t], text.window)[0] for t in (caption, word))
    if first[1] not in ids:
        raise UsageError(f"the caption {caption!r:.100} does not hold the word {word!r}")
    read = _read(bundle, caption)
    return read[ids.index(first[1]) : text.tokenizer.length(caption) - 1 if exact else len(read)]


def of_captions(bundle: Any, captions: Sequence[str], exact: bool = False) -> Tensor:
    """The text's features [n,d] of captions: every token that the network reads, or exactly those of the text, the two ends
    too, the filling not."""
    length = bundle.text.tokenizer.length
    return torch.cat([_read(bundle, c)[: length(c) if exact else None] for c in captions])


def _read(bundle: Any, caption: str) -> Tensor:
    """The features [L,d] that the network attends to: with no mask the filling too."""
    cond = bundle.text([caption])
    found: Tensor = cond.tokens[0] if cond.mask is None else cond.tokens[0][cond.mask[0]]
    return found


def _word(folder: Path) -> str:
    return next(iter(lora.read(folder / DIFFUSERS)[0]))


def _lines(file: str) -> list[str]:
    try:
        found = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--captions {file!r:.120} cannot be read: {error!s:.100}") from error
    if not found:
        raise UsageError(f"--captions {file!r:.120} holds no caption")
    return found
