"""A model's autoencoder, trained on with a folder of pictures: its decoder, so that latents stay what they are, or all of it.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752, section 3.1.
"""

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

from ldm_pipe import loading, strict
from ldm_pipe.errors import UsageError
from ldm_pipe.parts import read_json
from train import folder as model_folder
from train.data.check import check_data
from train.data.dataset import Data, Dataset, Seen
from train.data.order import Visit, stream
from train.data.precomputed import digest, pixels
from train.data.source import Fault
from train.job import Batch, Job
from train.objectives.reconstruction import Autoencoder


@dataclass(frozen=True)
class Vae(Autoencoder):
    """Trains the AutoencoderKL of `model` ("builtin" or a folder); the export is that model with the new one.

    data: the table of train/data/dataset.py; captions are not needed. train_encoder: with it latents change, and a diffusion
    network that was trained on the old ones no longer fits. kl: weight of the KL term in nats per image, relative to the summed
    squared error; it says nothing where the encoder stays. held_out: pictures kept out of training, for the validation.
    """

    TABLES: ClassVar[Mapping[str, type]] = {"data": Data}

    data: dict[str, Any] = field(default_factory=dict)
    model: str = "builtin"
    train_encoder: bool = False
    kl: float = 1e-6
    held_out: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        strict.build(Data, self.data, "[data]")

    def grouped(self, size: int) -> Vae:
        """The same task for steps of `size` samples, which are then of one shape."""
        return dataclasses.replace(self, group=size)

    @cached_property
    def source(self) -> Path:
        """The model's folder."""
        found = loading.BUILTIN if self.model == "builtin" else Path(self.model)
        if not (found / "vae").is_dir():
            raise UsageError(f"task.model {self.model!r} has no vae")
        return found

    @cached_property
    def settings(self) -> Data:
        """The [data] table: no captions, cuts always fresh."""
        return dataclasses.replace(strict.build(Data, self.data, "[data]"), allow_missing=True, cache="")

    @cached_property
    def _shape(self) -> tuple[int, int, int]:
        """(channels of a latent, pixels of its side, side that pictures are cut to)."""
        config = read_json(self.source / "vae" / "config.json")
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return int(config["latent_channels"]), factor, int(config.get("sample_size", 256))

    @cached_property
    def _split(self) -> tuple[Dataset, Dataset | None]:
        _, factor, side = self._shape
        whole = Dataset.open(self.settings, side, factor, self.group)
        if not 0 <= self.held_out < len(whole):
            raise UsageError(f"held_out is {self.held_out} and {self.settings.path} holds {len(whole)} pictures")
        order = [int(i) for i in stream(0, "held out", 0).permutation(len(whole))]
        rows = sorted(order[self.held_out :]), sorted(order[: self.held_out])
        return whole.part(rows[0]), whole.part(rows[1]) if self.held_out else None

    def facts(self) -> dict[str, str]:
        """Digests of the data, of the weights that training began with and of the tower."""
        return {**super().facts(), "data": self._split[0].facts, "weights": digest(self.source, "vae")}

    def net(self) -> nn.Module:
        """The trainable codec, of which the encoder may be frozen."""
        from diffusers import AutoencoderKL

        codec = AutoencoderKL.from_pretrained(self.source / "vae", use_safetensors=True).float()
        codec.requires_grad_(True)
        for part in (codec.encoder, codec.quant_conv):
            if part is not None and not self.train_encoder:
                part.requires_grad_(False)
        return self.loss(codec, self.kl)

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """images: [B,3,H,W] in -1..1; noise: [B,C,h,w] standard normal, for the posterior; names of the pictures."""
        data, (channels, factor, _) = self._split[0], self._shape
        seen = [data.seen(seed, i) for i in ids]
        w, h = (side // factor for side in seen[0].geometry.size)
        noise = [stream(seed, "noise", s.row, s.visit).standard_normal((channels, h, w), dtype=np.float32) for s in seen]
        images = torch.stack([pixels(data, s) for s in seen])
        return {
            "images": images,
            "noise": torch.from_numpy(np.stack(noise)),
            **self.heard(ids),
            "names": [data.name(s) for s in seen],
        }

    def validate(self, net: Any, folder: Path) -> dict[str, float]:
        """PSNR in dB of the held-out pictures, without noise."""
        held = self._split[1]
        if held is None:
            return {}
        device = next(net.parameters()).device
        seen = [Seen(i, 0, held.cut(0, Visit(i, 0, 0)), "") for i in range(len(held))]
        found = [_psnr(net.codec, pixels(held, s)[None].to(device)) for s in seen]
        return {"held_out_psnr": float(torch.stack(found).mean())}

    def export(self, net: Any, folder: Path) -> None:
        """The whole model with the new codec. Where the encoder learned, scale and shift are those of its latents."""
        codec = net.codec
        if self.train_encoder:
            with torch.no_grad():
                found = [codec.encode(self.batch(0, [i])["images"].to(codec.device)).latent_dist.mean for i in range(64)]
            flat = torch.cat([f.flatten() for f in found])
            shift = float(flat.mean()) if codec.config.get("shift_factor") is not None else None
            codec.register_to_config(scaling_factor=float(1 / flat.std()), shift_factor=shift)
        model_folder.copy(self.source, folder, ["vae"])
        codec.save_pretrained(folder / "vae")
        model_folder.write_sums(folder)

    def check(self, job: Job) -> list[Fault]:
        """Faults of the data; no weight is read."""
        _, factor, side = self._shape
        found = check_data(self.settings, self.settings.sizes(side, factor), job.batch)
        return [f for f in found if "has no caption" not in f.words]


def _psnr(codec: Any, images: Tensor) -> Tensor:
    out = codec.decode(codec.encode(images).latent_dist.mean).sample
    return 10 * torch.log10(4 / (out - images).square().mean())
