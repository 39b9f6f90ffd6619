"""Several concepts of Custom Diffusion made one file: `python -m train concepts --concept FOLDER="a <toy> fox" ... -o FILE`.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, eq. 4: for the words of each
concept the keys and values are those of its own training; elsewhere they change as little as can be on given captions. Here
by default that is weighed, not forced: what a network attends to behind the caption's end tells of the word too, and so many
tokens cannot all be met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_pipe import embedding, files, loading, lora
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train.tasks.custom_diffusion import DIFFERENCES
from train.tasks.textual_inversion import DIFFUSERS


def concepts(
    model: str, given: Sequence[str], captions: str, output: Path, weight: float = 3.0, ridge: float = 0.0
) -> list[str]:
    """Merge exports of the task custom_diffusion, each "FOLDER=CAPTION" with its word in the caption; a folder that is given
    again has more captions.

    captions: a file of captions, one a line, on which the least changes. weight: of the concepts' tokens, from the word on to
    the last that the network reads, where those of the captions count 1; inf: eq. 4 exactly, on the tokens from the word to its
    caption's end. ridge: above 0 where captions are few (`spread`). Returns how the result is used. Raises UsageError on
    what is missing or does not fit.
    """
    if not weight > 0 or ridge < 0:
        raise UsageError("--weight takes more than 0, or inf; --ridge takes 0 or more")
    told = _told(given)
    bundle = plain = loading.load(loading.BUILTIN if model == "builtin" else model)
    for folder in told:
        bundle, _ = embedding.learn(bundle, folder / DIFFUSERS)
    network, exact, owns = lora.parts(plain)[NETWORK], math.isinf(weight), dict[str, list[Tensor]]()
    words, regular = list[Tensor](), of_captions(bundle, _lines(captions), exact)
    for folder, said in told.items():
        words.append(torch.cat([of_word(bundle, _word(folder), caption, exact) for caption in said]))
        for (_, layer), leaves in lora.opened({NETWORK: network}, folder / DIFFERENCES)[0].items():
            owns.setdefault(layer, []).append(leaves["whole"])
    over, tensors = spread(words, regular, weight, ridge), dict[str, Tensor]()
    for layer, moves in owns.items():
        tensors[f"lora_unet_{layer.replace('.', '_')}.diff"] = merged(words, moves, over).float().contiguous()
    files.write(output, save(tensors, metadata={"format": "pt"}))
    learned = " ".join(f"--embedding {folder / DIFFUSERS}" for folder in told)
    return [f"--lora {output} {learned}"]


def spread(words: Sequence[Tensor], regular: Tensor, weight: float = math.inf, ridge: float = 0.0) -> Tensor:
    """How what is asked of the concepts' tokens is met by weights that read text, [s,d] in float64, for `merged`.

    words: of each concept its tokens, [n,d], s in all. regular: tokens [m,d] of many captions, m at least d (else a ridge).
    weight inf: minimises mean |(W - W0) c'|^2 over the regular tokens + ridge |W - W0|^2 under W c' = W_own c' for every token
    of a concept (eq. 4 and its Lagrangian solution); one that stands twice counts once, as the first concept has it. Finite:
    weight times mean |(W - W_own) c'|^2, over the tokens of a concept and over the concepts, is added instead; any number of
    tokens is taken then, and such as are nearly the same under different concepts. Raises UsageError where none is a solution.
    """
    seen, asked = regular.double(), torch.cat([w.double() for w in words])
    gram = seen.T @ seen / len(seen) + ridge * torch.eye(seen.shape[1], dtype=torch.float64)
    few = "the captions do not fill the text's {} widths; give more captions, or a ridge above 0"
    if not math.isinf(weight):
        counts = torch.cat([w.new_full((len(w), 1), weight / (len(words) * len(w)), dtype=torch.float64) for w in words])
        return _solved(gram + asked.T @ (counts * asked), (counts * asked).T, few).T
    once = [not any(torch.allclose(row, other) for other in asked[:i]) for i, row in enumerate(asked)]
    d = _solved(gram, asked[once].T, few).T
    found = torch.zeros_like(asked)
    found[once] = _solved(d @ asked[once].T, d, "no weights meet {} tokens exactly; give fewer captions, or a --weight")
    return found


def _solved(matrix: Tensor, right: Tensor, fault: str) -> Tensor:
    """The solution of matrix [n,n] x = right [n,k]. Raises UsageError with the fault where there is none."""
    if torch.linalg.matrix_rank(matrix) < len(matrix):
        raise UsageError(fault.format(len(matrix)))
    found: Tensor = torch.linalg.solve(matrix, right)
    return found


def merged(words: Sequence[Tensor], moves: Sequence[Tensor], over: Tensor) -> Tensor:
    """W - W0 [out,d] of a layer in float64, of what each concept's own training moved it by (W_own - W0, [out,d] each)."""
    asked = torch.cat([tokens.double() @ move.double().T for tokens, move in zip(words, moves, strict=True)])
    return asked.T @ over


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
        if len(list(folder.glob("learned_embeds*"))) > 1:
            raise UsageError(
                f"--concept {str(folder)!r:.120} holds words that learned together already; it takes one of one word"
            )
    return told


def of_word(bundle: Any, word: str, caption: str, exact: bool = False) -> Tensor:
    """The text's features [n,d] from a word on: to the last that the network reads, or exactly to the caption's last word.
    Raises UsageError where the word is not in the caption."""
    text = bundle.text
    ids, first = (text.tokenizer([t], text.window)[0] for t in (caption, word))
    if first[1] not in ids:
        raise UsageError(f"the caption {caption!r:.100} does not hold the word {word!r}")
    found: Tensor = text([caption]).tokens[0, ids.index(first[1]) : text.tokenizer.length(caption) - 1 if exact else None]
    return found


def of_captions(bundle: Any, captions: Sequence[str], exact: bool = False) -> Tensor:
    """The text's features [n,d] of captions: every token that the network reads, or exactly those of the text, the two ends
    too, the filling not."""
    length = bundle.text.tokenizer.length
    return torch.cat([bundle.text([c]).tokens[0, : length(c) if exact else None] for c in captions])


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
