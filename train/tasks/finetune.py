"""Full fine-tuning of a model on a folder of pictures: its U-Net (or transformer), and on request its CLIP text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ldm_pipe import loading, strict, tokens
from ldm_pipe.errors import UsageError
from ldm_pipe.networks import light_clip
from ldm_pipe.parts import read_json
from train import folder as model_folder
from train import gradient_checkpointing, text_encoders, validation
from train.data.check import check_data
from train.data.dataset import Data, Dataset, Seen
from train.data.order import Visit, stream
from train.data.precomputed import Precomputed, digest, pixels
from train.data.source import Fault
from train.job import Batch, Job, Task
from train.objectives.denoiser import DenoiserLoss
from train.objectives.objective import Objective, read
from train.objectives.repa import Repa
from train.objectives.uncertainty import LogVariance


@dataclass(frozen=True)
class Finetune(Task):
    """Trains a loaded model on, in its own path and prediction; the export is a model folder like the one it began with.

    model: "builtin" or a folder. data, objective, repa: the tables of train/data/dataset.py, train/objectives/objective.py and
    train/objectives/repa.py (empty: no second teacher). train_network, train_text: what is trained. gradient_checkpointing:
    less memory, more time. blind: share of visits without the picture, in a model that is told of it beside the words (unCLIP).
    log_variance: learn a weight per level (EDM2). held_out: pictures kept out of training, for the validation loss. prompts: of
    the validation pictures. group: set by the loop.
    """

    TABLES: ClassVar[Mapping[str, type]] = {"data": Data, "repa": Repa}
    beside: ClassVar[bool] = False  # does `batch` bring further channels behind x?
    shows: ClassVar[bool] = True  # is a model that knows pictures (unCLIP) told of each?

    data: dict[str, Any]
    model: str = "builtin"
    objective: dict[str, Any] = field(default_factory=dict)
    repa: dict[str, Any] = field(default_factory=dict)
    train_network: bool = True
    train_text: bool = False
    gradient_checkpointing: bool = False
    blind: float = 0.25
    log_variance: bool = False
    held_out: int = 0
    prompts: tuple[str, ...] = ()
    group: int = 1

    def __post_init__(self) -> None:
        if not (self.train_network or self.train_text):
            raise UsageError("nothing is trained: set train_network or train_text")
        if not 0 <= self.blind <= 1:
            raise UsageError(f"blind is {self.blind:g}; it takes 0 to 1")
        strict.build(Data, self.data, "[data]")
        read(self.objective)

    def grouped(self, size: int) -> Finetune:
        """The same task for steps of `size` samples, which are then of one shape."""
        return dataclasses.replace(self, group=size)

    @property
    def frame(self) -> Path:
        """The folder that the recipe names."""
        return loading.BUILTIN if self.model == "builtin" else Path(self.model)

    @cached_property
    def source(self) -> Path:
        """The folder that training begins with."""
        return self.frame

    @cached_property
    def bundle(self) -> Any:
        """The model, loaded."""
        return loading.load(self.model)

    @cached_property
    def plan(self) -> Objective:
        """The objective of the recipe."""
        return read(self.objective)

    @cached_property
    def settings(self) -> Data:
        """The [data] table."""
        return strict.build(Data, self.data, "[data]")

    @cached_property
    def _split(self) -> tuple[Dataset, Dataset | None]:
        side, step = model_folder.shape_of(self.source)
        whole = Dataset.open(self.settings, side, step, self.group)
        if not self.held_out:
            return whole, None
        if self.held_out >= len(whole):
            raise UsageError(f"held_out is {self.held_out} and {self.settings.path} holds {len(whole)} pictures")
        order = [int(i) for i in stream(0, "held out", 0).permutation(len(whole))]
        return whole.part(sorted(order[self.held_out :])), whole.part(sorted(order[: self.held_out]))

    @property
    def dataset(self) -> Dataset:
        """What is trained on."""
        return self._split[0]

    def facts(self) -> dict[str, str]:
        """Digests of the data and of the weights that training began with."""
        return {"data": self.dataset.facts, "weights": digest(self.source, "")}

    @cached_property
    def precomputed(self) -> Precomputed:
        """The caches of latents and text features."""
        return Precomputed(self.source, self.bundle, self.settings)

    @property
    def _live_text(self) -> bool:
        """Are prompts encoded at every step?"""
        return self.train_text or self.settings.shuffle or not self.settings.cache

    def _captions(self) -> list[str]:
        return list(dict.fromkeys(c for d in filter(None, self._split) for c in d.captions()))

    # --- the network

    def net(self) -> nn.Module:
        """The trainable module; latents and text features that are missing from the cache are made first."""
        bundle = self.bundle
        self.plan.check(bundle.model)
        if bundle.inserts is not None and not self.beside:
            raise UsageError("models that take a picture beside the noise are trained by the task concat")
        if self.settings.cache:
            for dataset in filter(None, self._split):
                self.precomputed.fill_latents(dataset)
                if self._told:
                    self.precomputed.fill_vectors(dataset)
        if not self._live_text:
            self.precomputed.fill_text(self._captions())
        bundle.model.requires_grad_(self.train_network)
        if self.gradient_checkpointing:
            gradient_checkpointing.use(bundle.model)
        text = text_encoders.learning(bundle) if self.train_text else {}
        found = DenoiserLoss(bundle, self.plan, text, LogVariance() if self.log_variance else None)
        if self.repa:
            plan = strict.build(Repa, self.repa, "[repa]")
            found.teacher = plan.teacher(found.width_at(plan.site, self.batch(0, range(1))))
        return found

    # --- a batch

    def said(self, seed: int, seen: Seen) -> str:
        """The caption that a visit is trained with."""
        return seen.caption

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """x0 [B,C,h,w] (or images [B,3,H,W]), what the objective draws, the text, the mask; names of the pictures."""
        data = self.dataset
        seen = [data.seen(seed, i) for i in ids]
        codec = self.bundle.codec
        shape = (codec.channels, *(side // codec.factor for side in reversed(seen[0].geometry.size)))
        draws = [self.plan.draw(stream(seed, "noise", s.row, s.visit), shape) for s in seen]
        batch: Batch = {n: torch.from_numpy(np.stack([d[n] for d in draws])) for n in draws[0]}
        captions = [self.said(seed, s) for s in seen]
        if self._live_text:
            batch |= {f"ids_{n}": t for n, t in self.bundle.text.ids(captions).items()}
        else:
            batch |= {f"text_{n}": t for n, t in self.precomputed.text(captions).items()}
        if self._told:
            batch["text_picture"] = torch.stack([self.precomputed.told(data, seed, s, self.blind) for s in seen])
        batch["text_sizes"] = torch.tensor([s.geometry.time_ids for s in seen], dtype=torch.float32)
        if self.settings.cache:
            batch["x0"] = torch.stack([self.precomputed.latent(data, s) for s in seen])
        if self.repa or not self.settings.cache:
            batch["images"] = torch.stack([pixels(data, s) for s in seen])
        masks = [data.mask(s) for s in seen]
        if any(masks):
            batch["mask"] = torch.stack([_small(m, shape) for m in masks])
        return {**batch, "names": [data.name(s) for s in seen]}

    @property
    def _told(self) -> bool:
        """Is the network told of the picture itself?"""
        return self.shows and self.bundle.vectors is not None and self.blind < 1

    # --- what comes out

    def validate(self, net: Any, folder: Path) -> dict[str, float]:
        """The loss on held-out pictures by level, and pictures of the prompts."""
        found: dict[str, float] = {}
        held = self._split[1]
        if held is not None:
            seen = [Seen(i, 0, held.cut(0, Visit(i, 0, 0)), (*held.rows[i].captions, "")[0]) for i in range(len(held))]
            device = next(net.parameters()).device
            latents = [self.precomputed.encoded(held, s).to(device) for s in seen]
            conds = [self.bundle.text([s.caption]).to(device) for s in seen]
            if self._told:
                told = [self.precomputed.told(held, 0, s, 0.0).to(device) for s in seen]
                conds = [
                    dataclasses.replace(c, extras={**c.extras, "picture": t[None]}) for c, t in zip(conds, told, strict=True)
                ]
            found = validation.banded_loss(self.bundle.model, latents, conds)
        if self.prompts:
            validation.draw(self.bundle, self.prompts, folder)
        return found

    def export(self, net: Any, folder: Path) -> None:
        """The whole model, with what was trained in it."""
        network = model_folder.network_part(self.source)
        texts = text_encoders.clips(self.bundle) if self.train_text else {}
        model_folder.copy(self.source, folder, [network] * self.train_network + [*texts])
        if self.train_network:
            inner = self.bundle.model.network
            model_folder.write_part(self.source, folder, network, getattr(inner, network, None) or next(inner.children()))
        for part, encoder in texts.items():
            model_folder.write_part(self.source, folder, part, encoder, light_clip.renamed)
        model_folder.add_words(folder, self._captions())
        model_folder.write_sums(folder)

    def check(self, job: Job) -> list[Fault]:
        """Faults of the data, by the sizes and the tokenizer of the model; no weight is read."""
        side, step = model_folder.shape_of(self.frame)
        sizes, encoder = self.settings.sizes(side, step), self.frame / "text_encoder" / "config.json"
        if not encoder.exists():  # a model of classes
            return check_data(self.settings, sizes, job.batch)
        config = read_json(encoder)
        tokenizer = tokens.read(self.frame / "tokenizer", int(config["vocab_size"]))
        length = tokenizer.length if tokenizer else None
        return check_data(self.settings, sizes, job.batch, length, int(config.get("max_position_embeddings", 77)))


def _small(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """A grey mask at the size of latents, [1,h,w] in 0..1; all ones where there is none."""
    if mask is None:
        return torch.ones(1, *shape[1:])
    grey = np.asarray(mask.resize((shape[2], shape[1]), 4), dtype=np.float32)  # 4: the mean over each latent's pixels
    return torch.from_numpy(grey)[None] / 255
