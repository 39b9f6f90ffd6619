"""DreamBooth: a model learns what a few pictures show, beside pictures of the class that it drew itself.

DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation, Ruiz et al. 2022, arXiv 2208.12242,
section 3.2: a rare word names the subject, prior weight 1, about 1000 steps at 5e-6 (all weights; 1e-4 for low-rank branches).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ldm_pipe.errors import UsageError
from train.data.dataset import Data, Seen
from train.data.precomputed import digest
from train.job import Batch
from train.prior import Prior, drawn, joined
from train.tasks.finetune import Finetune
from train.tasks.lora import Lora


@dataclass(frozen=True)
class Dreambooth(Lora):
    """Trains on a subject; the fields are those of the task lora.

    instance: the caption of pictures that have none of their own. prior: the prompt of the class, or several prompts of what
    is to stay as it is ("": no second term). prior_images, prior_weight: how many pictures of them are drawn, once, and how
    much they count. full: every weight of the network learns instead of branches, and the export is a whole model.
    """

    shows: ClassVar[bool] = False  # a word has nothing to tell of a picture that is shown

    instance: str = "a photo of a sks dog"
    prior: str | tuple[str, ...] = "a photo of a dog"
    prior_images: int = 200
    prior_weight: float = 1.0
    full: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior and self.settings.buckets:
            raise UsageError("dreambooth with a prior takes squares: set data.buckets to false, or prior to an empty text")
        if not all(self._prompts):
            raise UsageError("prior holds an empty prompt; it takes a text or a list of texts")
        if self.prior_images < max(1, len(self._prompts)) or self.prior_weight < 0:
            raise UsageError("prior_images takes 1 or more for every prompt of the prior, prior_weight 0 or more")
        if self.prior and not self.settings.cache:
            raise UsageError("data.cache is empty; the pictures of the prior are kept there")

    @property
    def _prompts(self) -> tuple[str, ...]:
        several = ((self.prior,) if self.prior else ()) if isinstance(self.prior, str) else self.prior
        return tuple(" ".join(prompt.split()) for prompt in several)  # as captions are read

    @cached_property
    def settings(self) -> Data:
        """The [data] table; captions are not needed."""
        return replace(super().settings, allow_missing=True)

    @cached_property
    def _prior(self) -> Prior:
        """The class's pictures, drawn where they are missing, as a task on the same loaded model."""
        weights, cache = digest(self.source, ""), Path(self.settings.cache)
        folder = drawn(self.bundle, weights, self._prompts, self.prior_images, cache)
        data = {**self.data, "path": str(folder), "allow_missing": True}
        task = Prior(data, self.model, self.objective, train_text=self.train_text, group=self.group)
        vars(task)["bundle"] = self.bundle
        return task

    def _captions(self) -> list[str]:
        return list(dict.fromkeys([*super()._captions(), self.instance, *self._prompts]))

    def said(self, seed: int, seen: Seen) -> str:
        """The picture's own caption, or the instance's."""
        return seen.caption or self.instance

    def net(self) -> nn.Module:
        """What learns; the pictures of the class, and their latents, are made first."""
        if self.prior:
            self._prior.precomputed.fill_latents(self._prior.dataset)
        return Finetune.net(self) if self.full else super().net()

    def batch(self, seed: int, ids: Any) -> Batch:
        """The subject's samples, then as many of the class."""
        own = super().batch(seed, ids)
        return joined(own, self._prior.batch(seed + 1, ids), self.prior_weight) if self.prior else own

    def export(self, net: Any, folder: Path) -> None:
        """The branches in both layouts, or the whole model."""
        return Finetune.export(self, net, folder) if self.full else super().export(net, folder)
