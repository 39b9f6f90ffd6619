"""Pictures of the class that the model itself draws, trained along so that it does not forget the class.

DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, Ruiz et al. 2022, arXiv 2208.12242, eq. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_pipe import Pipeline, files
from train.data.cache import key_of
from train.data.dataset import Seen
from train.job import Batch
from train.tasks.finetune import Finetune


@dataclass(frozen=True)
class Prior(Finetune):
    """The drawn pictures as a data set, each with the prompt that it was drawn from."""

    shows: ClassVar[bool] = False

    def said(self, seed: int, seen: Seen) -> str:
        """The prompt: never dropped, never shuffled."""
        return self.dataset.rows[seen.row].captions[0]


def drawn(bundle: Any, weights: str, prompts: Sequence[str], count: int, cache: Path) -> Path:
    """The folder with `count` pictures, drawn with the model's defaults where it is missing: image k is of seed k and of the
    k-th prompt, over and over.

    weights: the digest of the model's.
    """
    folder = cache / f"prior-{key_of(weights=weights, prompts=list(prompts), count=count)[:16]}"
    if not folder.exists():
        with files.new_folder(folder) as temp:
            said = [prompts[k % len(prompts)] for k in range(count)]
            for k, picture in enumerate(Pipeline(bundle)(said, seeds=tuple(range(count))).images):
                picture.save(temp / f"{k:04}.png")
                (temp / f"{k:04}.txt").write_text(said[k], encoding="utf-8")
    return folder


def joined(own: Batch, prior: Batch, weight: float) -> Batch:
    """Both batches as one whose mean loss is the mean of `own` plus `weight` times that of `prior`: the mask of a sample holds
    its weight."""
    scaled = []
    for batch, times in ((own, 2.0), (prior, 2.0 * weight)):
        noise: Tensor = batch["noise"]
        mask = batch.get("mask", noise.new_ones(len(noise), 1, *noise.shape[2:]))
        scaled.append({**batch, "mask": mask * times})
    one, two = scaled
    return {n: torch.cat([v, two[n]]) if isinstance(v, Tensor) else [*v, *two[n]] for n, v in one.items()}
