"""Latents and text features of a data set under one model, made once and kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_pipe import files, image
from ldm_pipe.errors import UsageError
from train.data.cache import Cache, key_of
from train.data.dataset import Data, Dataset, Seen
from train.data.order import Visit, stream

AGAIN = "they are made when the run is started again"


def digest(source: Path, part: str) -> str:
    """Of the weights and settings of one part of a model's folder ("": of all)."""
    found = sorted({*(source / part).rglob("*.safetensors"), *(source / part).rglob("*config.json")})
    return key_of(files=[[f.relative_to(source).as_posix(), files.sha256(f)] for f in found])


def pixels(dataset: Dataset, seen: Seen) -> Tensor:
    """A cut picture, [3,H,W] in -1..1."""
    return image.to_tensor([dataset.picture(seen)])[0]


@dataclass(frozen=True, eq=False)
class Precomputed:
    """The caches that belong to a model (its folder, and loaded) and a [data] table."""

    source: Path
    bundle: Any
    data: Data

    @cached_property
    def _latents(self) -> Cache:
        return Cache(Path(self.data.cache), "latents")

    @cached_property
    def _texts(self) -> Cache:
        return Cache(Path(self.data.cache), "text")

    @cached_property
    def _vectors(self) -> Cache:
        return Cache(Path(self.data.cache), "vectors")

    @cached_property
    def _tower(self) -> str:
        parts = [digest(self.source, "image_encoder")]
        prepared = self.source / "feature_extractor" / "preprocessor_config.json"
        return key_of(parts=parts, prepared=files.sha256(prepared) if prepared.exists() else "")

    @cached_property
    def _vae(self) -> str:
        return digest(self.source, "vae")

    @cached_property
    def _text(self) -> str:
        parts = (p for p in sorted(self.source.iterdir()) if p.name.startswith(("text_encoder", "tokenizer")))
        index = files.sha256(self.source / "model_index.json")  # where a model of classes names them
        return key_of(parts=[digest(self.source, p.name) for p in parts], index=index)

    def _latent_key(self, dataset: Dataset, seen: Seen) -> str:
        content = {"picture": dataset.digests[seen.row], "geometry": list(seen.geometry)}
        return key_of(weights=self._vae, dtype="fp16" if self.data.half else "fp32", **content)

    def _vector_key(self, dataset: Dataset, seen: Seen) -> str:
        return key_of(weights=self._tower, picture=dataset.digests[seen.row], geometry=list(seen.geometry))

    def _text_key(self, caption: str) -> str:
        return key_of(weights=self._text, caption=caption, dtype="fp32")

    def fill_latents(self, dataset: Dataset) -> int:
        """Make the latents that are missing, of all variants of all pictures. Returns how many."""
        by_size: dict[tuple[int, int], dict[str, Seen]] = {}
        for s in _variants(dataset):
            by_size.setdefault(s.geometry.size, {})[self._latent_key(dataset, s)] = s

        def make(wanted: Sequence[Seen]) -> dict[str, Tensor]:
            with torch.no_grad():
                latents = self.bundle.codec.encode(torch.stack([pixels(dataset, s) for s in wanted]))
            return {"value": latents.to(torch.float16 if self.data.half else torch.float32)}

        return sum(self._latents.fill(wanted, make) for wanted in by_size.values())

    def fill_text(self, captions: Sequence[str]) -> int:
        """Make the text features that are missing. Returns how many."""

        def make(wanted: Sequence[str]) -> dict[str, Tensor]:
            cond = self.bundle.text(wanted)
            named = {"tokens": cond.tokens, "pooled": cond.pooled, "mask": cond.mask, **cond.extras}
            return {n: t for n, t in named.items() if t is not None}

        return self._texts.fill({self._text_key(c): c for c in captions}, make, batch=64)

    def fill_vectors(self, dataset: Dataset) -> int:
        """Make what a model that is told of pictures sees in them, where it is missing. Returns how many."""

        def make(wanted: Sequence[Seen]) -> dict[str, Tensor]:
            return {"value": self.bundle.vectors.seen([dataset.picture(s) for s in wanted])}

        return self._vectors.fill({self._vector_key(dataset, s): s for s in _variants(dataset)}, make)

    def vector(self, dataset: Dataset, seen: Seen) -> Tensor:
        """What the model sees in the picture of a visit, [D]. Raises UsageError where it is gone from the cache."""
        if not self.data.cache:
            found: Tensor = self.bundle.vectors.seen([dataset.picture(seen)])[0]
            return found
        held = self._vectors.get(self._vector_key(dataset, seen))
        if held is None:
            raise UsageError(f"the cached vector of {dataset.name(seen)!r} is gone from {self.data.cache!r}; {AGAIN}")
        return held["value"]

    def told(self, dataset: Dataset, seed: int, seen: Seen, blind: float) -> Tensor:
        """What the network is told of a visit's picture, [2D]: its vector under noise of any level, or, in a share `blind` of
        the visits, zeros."""
        vectors, rng = self.bundle.vectors, stream(seed, "picture", seen.row, seen.visit)
        shown, level = rng.random() >= blind, int(rng.integers(vectors.noisiest + 1))
        noise = torch.from_numpy(rng.standard_normal((1, vectors.width), dtype=np.float32))
        found: Tensor = vectors.noised(self.vector(dataset, seen)[None], noise, level)[0]
        return found * shown

    def latent(self, dataset: Dataset, seen: Seen) -> Tensor:
        """The latent of a visit, fp32 [C,h,w]. Raises UsageError where it is gone."""
        found = self._latents.get(self._latent_key(dataset, seen))
        if found is None:
            raise UsageError(f"the cached latent of {dataset.name(seen)!r} is gone from {self.data.cache!r}; {AGAIN}")
        return found["value"].float()

    def encoded(self, dataset: Dataset, seen: Seen) -> Tensor:
        """The latent of a visit, [1,C,h,w], from the cache where there is one."""
        if self.data.cache:
            return self.latent(dataset, seen)[None]
        with torch.no_grad():
            return self.bundle.codec.encode(pixels(dataset, seen)[None])

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Text features by name, the captions first. Raises UsageError where one is gone."""
        rows = [self._texts.get(self._text_key(c)) for c in captions]
        if any(r is None for r in rows):
            raise UsageError(f"cached text features are gone from {str(self._texts.folder)!r}; {AGAIN}")
        whole = [r for r in rows if r is not None]
        return {n: torch.stack([r[n] for r in whole]) for n in whole[0]}


def _variants(dataset: Dataset) -> list[Seen]:
    """Every cut of every picture that visits can show."""
    rows = range(len(dataset))
    return [Seen(i, v, dataset.cut(0, Visit(i, v, 0)), "") for i in rows for v in range(dataset.data.variants)]
