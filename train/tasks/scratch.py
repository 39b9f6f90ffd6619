"""Latent diffusion from scratch on a folder of pictures: a fresh U-Net or DiT, with another model's codec and text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ldm_pipe import files, loading, strict
from ldm_pipe.errors import UsageError
from train.data.cache import key_of
from train.data.precomputed import digest
from train.data.source import open_source
from train.fresh import Fresh
from train.tasks.finetune import Finetune


@dataclass(frozen=True)
class Scratch(Finetune):
    """Fine-tuning that begins with fresh weights. `model` lends the codec and the text encoder; network: see train/fresh.py.

    weights_seed: of the fresh weights. The fresh model is kept in the cache under a key of all that it follows from.
    """

    TABLES: ClassVar[Mapping[str, type]] = {**Finetune.TABLES, "network": Fresh}

    network: dict[str, Any] = field(default_factory=dict)
    weights_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        plan = strict.build(Fresh, self.network, "[network]")
        if plan.kind == "dit" and (self.settings.buckets or self.train_text or self.settings.shuffle):
            raise UsageError("a dit takes squares and classes: set data.buckets and data.shuffle and train_text to false")
        if not self.settings.cache:
            raise UsageError("data.cache is empty; the fresh model is kept there")
        if plan.variance != bool(self.plan.hybrid):
            raise UsageError("network.variance and objective.hybrid go together")

    @cached_property
    def source(self) -> Path:
        """The folder of the fresh model, made where it is not there yet."""
        frame = loading.BUILTIN if self.model == "builtin" else Path(self.model)
        plan = strict.build(Fresh, self.network, "[network]")
        captions = self._classes() if plan.kind == "dit" else []
        parts = [digest(frame, p) for p in ("vae", "text_encoder", "tokenizer")]
        key = key_of(network=repr(plan), seed=self.weights_seed, frame=parts, classes=captions)
        folder = Path(self.settings.cache) / f"fresh-{key[:16]}"
        if not folder.exists():
            with files.new_folder(folder) as temp:
                plan.write(frame, temp, captions, self.weights_seed)
        return folder

    def _classes(self) -> list[str]:
        rows = open_source(self.settings.path, self.settings.columns).rows
        return sorted({c for r in rows for c in r.captions})

    @cached_property
    def bundle(self) -> Any:
        """The fresh model, loaded."""
        return loading.load(self.source)
