"""CLIP guidance: the score moves towards images whose CLIP embedding is near the prompt's.

Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, section 4.2) with CLIP's similarity (Radford et al. 2021, arXiv
2103.00020) in the place of log p(y | x), as in GLIDE (Nichol et al. 2021, arXiv 2112.10741, section 2.4); for want of a CLIP
that was trained on noisy images, it sees the decoded x0(x).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import tokens
from ldm_pipe.codec import Codec
from ldm_pipe.errors import LdmError, ModelError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.parts import foreign, read_json
from ldm_pipe.restore.operator import shifted, through

BUILTIN = Path(__file__).resolve().parent.parent / "builtin"
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, eq=False)
class Scorer:
    """A CLIP. network: a CLIPModel of transformers; mean, std: what it takes images to be normalised by, from 0..1."""

    network: Any
    tokenizer: tokens.Tokenizer
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of prompts, [B,D]."""
        window = int(self.network.config.text_config.max_position_embeddings)
        ids = torch.tensor(self.tokenizer(list(prompts), window), device=self.network.device)
        with torch.no_grad():
            pooled = self.network.text_model(input_ids=ids).pooler_output
            return F.normalize(self.network.text_projection(pooled), dim=-1)

    def look(self, images: Tensor) -> Tensor:
        """Unit vectors of images [B,3,H,W] in -1..1, [B,D]; the gradient goes through, also from another device."""
        images = images.to(self.network.device)
        side, kind = int(self.network.config.vision_config.image_size), self.network.dtype
        if images.shape[2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(v).to(images).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        pooled = self.network.vision_model(pixel_values=(((images + 1) / 2 - mean) / std).to(kind)).pooler_output
        return F.normalize(self.network.visual_projection(pooled), dim=-1)


@dataclass(frozen=True)
class Clip:
    """A Guide: the score moves by scale * gradient of the cosine between CLIP's vectors of decode(x0(x)) and of the prompt.

    folder: a CLIP in transformers' layout; "" is the one beside the built-in model. text: what to move towards; "" is each
    image's prompt. The gradient goes through the network and the decoder: about three times the work of an evaluation.
    """

    scale: float = 100.0
    folder: str = ""
    text: str = ""

    def prepared(self, codec: Codec, prompts: Sequence[str]) -> Toward:
        """The guide for these images."""
        scorer = read(self.folder)
        wanted = scorer.embed([self.text or p for p in prompts])
        return Toward(scorer, codec, wanted, self.scale)

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """Raises TypeError: the guide is `prepared` for a run first."""
        raise TypeError("a Clip guide is prepared(codec, prompts) before it is used")


@dataclass(frozen=True, eq=False)
class Toward:
    """The Guide of one run. wanted: unit vectors [B,D] of the texts."""

    scorer: Scorer
    codec: Codec
    wanted: Tensor
    scale: float

    def similarity(self, x0: Tensor) -> Tensor:
        """The cosines of decoded images with their texts, [B]."""
        seen = self.scorer.look(self.codec.decode(x0))
        return (seen * self.wanted.to(seen)).sum(1).to(x0)

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the moved score; itself at scale 0."""
        if self.scale == 0:
            return denoise

        def move(x: Tensor, level: Level) -> Estimate:
            if level.alpha == 0:
                return denoise(x, level)
            known, gradient = through(denoise, x, level, self.similarity)
            return shifted(known(x, level), self.scale * gradient, x, level)

        return move


@functools.lru_cache(maxsize=1)
def read(folder: str = "") -> Scorer:
    """The CLIP of a folder, in fp32 on the CPU; "" is the one that the built-in model was trained beside. Raises ModelError."""
    from transformers import CLIPTokenizer

    place = Path(folder) if folder else BUILTIN / "clip"
    try:
        network = foreign(place, "transformers", "CLIPModel")
        words = BUILTIN / "tokenizer" if not folder else place
        found = tokens.read(words, network.config.text_config.vocab_size)
        tokenizer = found or tokens.FromTransformers(CLIPTokenizer.from_pretrained(words, local_files_only=True))
        config = place / "preprocessor_config.json"
        given = read_json(config) if config.exists() else {}
        mean, std = (tuple(float(v) for v in given.get(f"image_{name}", HALF)) for name in ("mean", "std"))
        return Scorer(network, tokenizer, mean, std)
    except (LdmError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        why = f": {error}" if isinstance(error, LdmError) else ""
        what = folder or "the built-in CLIP"
        raise ModelError(f"clip: {what} cannot be read as a CLIP in transformers' layout{why}") from error
