"""The codec: an AutoencoderKL trained on rendered scenes.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752, section 3.1. The perceptual
and adversarial terms are off by default: the scenes are flat, and PSNR is what we ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.job import Batch
from train.objectives.reconstruction import Autoencoder
from train.world import render, scene_at


@dataclass(frozen=True)
class Codec(Autoencoder):
    """AutoencoderKL of factor 2^(len(channels) - 1).

    kl: weight of the KL term in nats per image, relative to the summed squared error of an image in -1..1.
    crop: train on windows of this size around objects (0: whole scenes). A convolutional codec learns sprites as well
    from a quarter of the pixels, at four times the speed; finish on whole scenes.
    vary: share of scenes mirrored and with exchanged colour channels, so that the codec also serves unseen sprites.
    start: an exported codec whose weights are taken where names and shapes agree ("": from scratch). One of another depth
    lends its layers of full resolution, which take longest to learn.
    Further terms: see train/objectives/reconstruction.py.
    """

    channels: tuple[int, ...] = (24, 48, 128, 192)
    latent_channels: int = 24
    layers: int = 1
    groups: int = 8
    kl: float = 1e-3
    crop: int = 0
    vary: float = 0.2
    start: str = ""

    def net(self) -> nn.Module:
        """The trainable codec."""
        from diffusers import AutoencoderKL

        n = len(self.channels)
        codec = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            sample_size=64,
            mid_block_add_attention=False,
            scaling_factor=1.0,
        )
        if self.start:
            _inherit(codec, AutoencoderKL.from_pretrained(self.start))
        return self.loss(codec, self.kl)

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """images: [B,3,H,W] in -1..1; noise: [B,C,h,w] standard normal, for the posterior."""
        side = (self.crop or 64) // 2 ** (len(self.channels) - 1)
        images, noise = [], []
        for i in ids:
            rng = np.random.Generator(np.random.Philox(key=[seed + 1, i]))  # apart from the stream that draws the scene
            images.append(self._image(seed, i, rng))
            noise.append(rng.standard_normal((self.latent_channels, side, side), dtype=np.float32))
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"images": pixels, "noise": torch.from_numpy(np.stack(noise)), **self.heard(ids)}

    def _image(self, seed: int, i: int, rng: np.random.Generator) -> np.ndarray:
        scene, _ = scene_at(seed, i)
        image = render(scene)
        if self.crop:
            x, y = scene.placed[rng.integers(len(scene.placed))].centre
            left, top = (
                int(np.clip(c - self.crop / 2 + rng.integers(-self.crop // 3, self.crop // 3 + 1), 0, 64 - self.crop))
                for c in (x, y)
            )
            image = image[top : top + self.crop, left : left + self.crop]
        if rng.random() < self.vary:
            image = image[:, ::-1][..., rng.permutation(3)]
        return image

    def export(self, net: Any, folder: Path) -> None:
        """Write `vae/` with the scale and shift that give its latents unit variance and zero mean."""
        codec = net.codec
        with torch.no_grad():
            images = self.batch(0, range(512))["images"] if not self.crop else _whole(512)
            latents = torch.cat([codec.encode(x).latent_dist.mean for x in images.split(32)])
        codec.register_to_config(
            scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()), latent_channels=self.latent_channels
        )
        codec.save_pretrained(folder / "vae")


def _whole(count: int) -> Tensor:
    images = np.stack([render(scene_at(0, i)[0]) for i in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _inherit(codec: Any, old: Any) -> None:
    """Copy what fits from another codec; decoder blocks are counted from the image side."""
    deeper = len(old.decoder.up_blocks) - len(codec.decoder.up_blocks)
    state, mine = old.state_dict(), codec.state_dict()
    for name in mine:
        parts = name.split(".")
        if parts[:2] == ["decoder", "up_blocks"]:
            parts[2] = str(int(parts[2]) + deeper)
        source = state.get(".".join(parts))
        if source is not None and source.shape == mine[name].shape:
            mine[name].copy_(source)
