"""Latent diffusion: a cross-attention U-Net on the codec's latents, with its text encoder.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752, eq. 3; conditioning
dropout of Classifier-Free Diffusion Guidance, Ho and Salimans 2022, arXiv 2207.12598, algorithm 1.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm_pipe.attention import set_backend
from ldm_pipe.cond import Cond
from ldm_pipe.model import Model
from ldm_pipe.networks.unet import UNet
from ldm_pipe.path import Flow
from ldm_pipe.prediction import FLOW
from train.data.latents import LatentCache
from train.job import Batch, Task
from train.objectives.grounding import grounding, watching
from train.objectives.objective import Objective, read
from train.world import scene_at
from train.world.scenes import caption
from train.world.slots import placed
from train.world.words import read_tokenizer


@dataclass(frozen=True)
class Latent(Task):
    """Trains a U-Net, and its text encoder with it, on latents that are computed once.

    channels, attention, layers: of each resolution, from the latents' own down by factors of two; a level of 0 layers only
    folds its map into the next. heads: of every attention.
    codec, text: exports of the stages before. scenes: how many are cached; each visit draws one of its captions anew.
    dropout: share of captions left empty. objective: a table, see train/objectives/objective.py.
    train_text: train the text encoder jointly (False: keep the contrastive one frozen). ground: weight of the loss that tells
    the attention where each of two objects stands (train/objectives/grounding.py; needs the `parse` stage). start: a model
    folder whose U-Net and text encoder are trained on, on the same codec ("": a fresh U-Net and the text encoder of `text`).
    """

    codec: str
    text: str
    scenes: int = 48_000
    channels: tuple[int, ...] = (64, 128, 256)
    attention: tuple[bool, ...] = (False, True, True)
    layers: tuple[int, ...] = (1, 1, 1)
    heads: int = 4
    dropout: float = 0.1
    objective: dict[str, Any] = field(default_factory=dict)
    train_text: bool = True
    ground: float = 0.0
    start: str = ""

    def net(self) -> nn.Module:
        """The trainable pair of U-Net and text encoder."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        text = CLIPTextModel.from_pretrained(Path(self.start or self.text) / "text_encoder", dtype=torch.float32)
        text.requires_grad_(self.train_text)
        self._cache()  # made now, by the first process alone
        if self.start:
            unet = UNet2DConditionModel.from_pretrained(Path(self.start) / "unet", torch_dtype=torch.float32)
        else:
            unet = self._fresh(text.config.hidden_size)
        set_backend(unet, "math")
        return LatentLoss(unet, text, self._objective(), self.ground)

    def _fresh(self, width: int) -> Any:
        """A U-Net for these latents and for text features of this width, its output zero."""
        from diffusers import UNet2DConditionModel

        latents = self._cache()
        kinds = ["CrossAttn" if a else "" for a in self.attention]
        unet = UNet2DConditionModel(
            sample_size=latents.shape[-1],
            in_channels=latents.shape[0],
            out_channels=latents.shape[0],
            layers_per_block=self.layers,
            block_out_channels=self.channels,
            down_block_types=tuple(f"{k}DownBlock2D" for k in kinds),
            up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
            cross_attention_dim=width,
            attention_head_dim=self.heads,  # diffusers' name for the number of heads
            resnet_time_scale_shift="scale_shift",
            addition_embed_type="text",  # the prompt also scales every block, not only through cross-attention
            addition_embed_type_num_heads=4,
        )
        nn.init.zeros_(unet.conv_out.weight)  # a zero output is the best guess before anything is known
        nn.init.zeros_(unet.conv_out.bias)
        return unet

    def _cache(self) -> LatentCache:
        return _cache(self.codec, self.scenes)

    def _objective(self) -> Objective:
        return read(self.objective, "objective")

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """x0, noise: [B,C,h,w]; normal: [B] for the level; tokens: [B,L]; named, boxes: what `grounding` takes; what else the
        objective draws."""
        latents, objective = self._cache(), self._objective()
        rows, words, draws, told = [], [], [], []
        for i in ids:
            rng = np.random.Generator(np.random.Philox(key=[seed + 11, i]))
            row = latents.row(seed, i)
            rows.append(row)
            scene, _ = scene_at(latents.seed, row)
            text = caption(scene, rng)
            words.append("" if rng.random() < self.dropout else text)
            if self.ground:
                told.append(placed(scene if words[-1] else None))
            draws.append(objective.draw(rng, latents.shape))
        tokens = read_tokenizer(self.text)(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        drawn = {name: torch.from_numpy(np.stack([d[name] for d in draws])) for name in draws[0]}
        where = dict(zip(("named", "boxes"), map(torch.stack, zip(*told, strict=True)), strict=False))  # {} where none is told
        return {"x0": latents.take(rows), "tokens": tokens, **where, **drawn}

    def export(self, net: Any, folder: Path) -> None:
        """Write a whole model: `unet/`, `text_encoder/`, copies of the other parts, and the index."""
        net.model.network.unet.save_pretrained(folder / "unet")
        _forget_path(folder / "unet" / "config.json")
        net.text.save_pretrained(folder / "text_encoder")
        shutil.copytree(Path(self.codec) / "vae", folder / "vae")
        for part in ("tokenizer", "clip"):
            shutil.copytree(Path(self.text) / part, folder / part)
        write_index(folder)


def _forget_path(config: Path) -> None:
    """Take out where on this machine the weights were that training went on from: diffusers writes it down."""
    told = json.loads(config.read_text())
    told.pop("_name_or_path", None)
    config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")


def write_index(folder: Path) -> None:
    """`model_index.json` and `scheduler/`, so that diffusers' StableDiffusionPipeline reads the folder too."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


@cache
def _cache(codec: str, scenes: int) -> LatentCache:
    return LatentCache.of(Path(codec) / "vae", scenes)


class LatentLoss(nn.Module):
    """The denoising loss of a batch, text encoder included."""

    def __init__(self, unet: nn.Module, text: nn.Module, objective: Objective, ground: float = 0.0) -> None:
        super().__init__()
        self.ground = ground
        self.model, self.text, self.objective = Model(UNet(unet), Flow(), FLOW), text, objective

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> loss: mean squared error of the flow; its means over the noisy and the clean half of the levels; each, u: [B]."""
        tokens = self.text(batch["tokens"]).last_hidden_state
        network: Any = self.model.network
        with contextlib.ExitStack() as stack:
            maps = stack.enter_context(watching(network.unet)) if self.ground else []
            terms = self.objective(self.model, batch["x0"], batch, Cond(tokens=tokens))
        noisy = (terms.u > 0.5).float()
        halves = {"noisy": _mean(terms.error, noisy), "clean": _mean(terms.error, 1 - noisy)}
        loss = terms.loss.mean()
        if self.ground:
            halves["grounding"] = grounding(maps, batch["named"], batch["boxes"])
            loss = loss + self.ground * halves["grounding"]
        return {"loss": loss, **halves, "each": terms.loss.detach(), "u": terms.u}


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (values * weight).sum() / weight.sum()
