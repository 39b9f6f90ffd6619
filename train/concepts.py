"""Several concepts of Custom Diffusion made one file: `python -m train concepts --concept FOLDER="a <toy> fox" ... -o FILE`.

Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al. 2022, arXiv 2212.04488, eq. 4: for the words of each
concept the keys and values are those of its own training; elsewhere they change as little as can be on given captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor

from ldm_pipe import embedding, files, loading, lora
from ldm_pipe.errors import UsageError
from ldm_pipe.lora_names import NETWORK
from train.tasks.custom_diffusion import DIFFERENCES, merged
from train.tasks.textual_inversion import DIFFUSERS


def concepts(model: str, given: Sequence[str], captions: str, output: Path, ridge: float = 0.0) -> list[str]:
    """Merge exports of the task custom_diffusion, each "FOLDER=CAPTION" with its word in the caption.

    captions: a file of captions, one a line, on which the least changes. ridge: is added to their Gram matrix; above 0 where
    they are few. Returns how the result is used. Raises UsageError on what is missing or does not fit.
    """
    pairs = [text.partition("=") for text in given]
    if len(pairs) < 2 or not all(caption.strip() for _, _, caption in pairs):
        raise UsageError('concepts takes two --concept FOLDER="a caption with the word" or more')
    for folder, _, _ in pairs:
        missing = [n for n in (DIFFERENCES, DIFFUSERS) if not (Path(folder) / n).is_file()]
        if missing:
            raise UsageError(f"--concept {folder!r:.120} has no {missing[0]}; it takes an export of the task custom_diffusion")
    bundle = plain = loading.load(loading.BUILTIN if model == "builtin" else model)
    for folder, _, _ in pairs:
        bundle, _ = embedding.learn(bundle, Path(folder) / DIFFUSERS)
    network = lora.parts(plain)[NETWORK]
    targets = dict[str, list[tuple[Tensor, Tensor]]]()
    for folder, _, caption in pairs:
        tokens = of_word(bundle, _word(Path(folder)), caption)
        for (_, layer), leaves in lora.opened({NETWORK: network}, Path(folder) / DIFFERENCES)[0].items():
            own = cast(Tensor, network.get_submodule(layer).weight).detach() + leaves["whole"]
            targets.setdefault(layer, []).append((tokens, own))
    regular, tensors = of_captions(bundle, _lines(captions)), dict[str, Tensor]()
    for layer, several in targets.items():
        weight = cast(Tensor, network.get_submodule(layer).weight).detach()
        new = merged(weight, several, regular, ridge) - weight.double()
        tensors[f"lora_unet_{layer.replace('.', '_')}.diff"] = new.float().contiguous()
    files.write(output, save(tensors, metadata={"format": "pt"}))
    words = " ".join(f"--embedding {Path(folder) / DIFFUSERS}" for folder, _, _ in pairs)
    return [f"--lora {output} {words}"]


def of_word(bundle: Any, word: str, caption: str) -> Tensor:
    """The text's features [n,d] from a word on to the end of its caption. Raises UsageError where the word is not in it."""
    text = bundle.text
    ids, first = (text.tokenizer([t], text.window)[0] for t in (caption, word))
    if first[1] not in ids:
        raise UsageError(f"the caption {caption!r:.100} does not hold the word {word!r}")
    found: Tensor = text([caption]).tokens[0, ids.index(first[1]) : text.tokenizer.length(caption) - 1]
    return found


def of_captions(bundle: Any, captions: Sequence[str]) -> Tensor:
    """The text's features [n,d] of every token of captions, the two ends too, the filling not."""
    text = bundle.text
    return torch.cat([text([c]).tokens[0, : min(text.tokenizer.length(c), text.window)] for c in captions])


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
