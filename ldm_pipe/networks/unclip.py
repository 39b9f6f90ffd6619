"""Stable Diffusion 2 that draws from a picture (unCLIP): its CLIP vector, noised, beside the words.

Hierarchical Text-Conditional Image Generation with CLIP Latents, Ramesh et al. 2022, arXiv 2204.06125, section 2.1, as
published in stable-diffusion-2-1-unclip; the noise on the vector is that of Cascaded Diffusion Models, Ho et al. 2021, arXiv
2106.15282, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm_pipe import weights
from ldm_pipe.cond import Cond
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.level import Path
from ldm_pipe.networks import unet as plain
from ldm_pipe.networks.unet import UNet
from ldm_pipe.parts import WEIGHTS, Made, Parts, read_json, vision
from ldm_pipe.schedule import path_of
from ldm_pipe.vision import ImageTower

if TYPE_CHECKING:
    from PIL.Image import Image


class UnCLIP(UNet):
    """The U-Net, told the noised vector of a picture and how noisy it is, `cond.extras["picture"]` [B,2D]; zeros are none."""

    def added(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """The vector as class labels."""
        width = self.unet.config.projection_class_embeddings_input_dim
        vector = cond.extras.get("picture", x.new_zeros(len(x), width))
        return {"class_labels": vector.to(x.dtype)}


@dataclass(frozen=True, eq=False)
class Vectors:
    """Pictures as vectors for the network. mean, std: of the vectors of training [1,D]; path: of the noise on them."""

    tower: ImageTower
    mean: Tensor
    std: Tensor
    path: Path

    @property
    def width(self) -> int:
        """D."""
        return self.mean.shape[1]

    @property
    def noisiest(self) -> int:
        """The highest noise level."""
        return int(self.path.last)

    def __call__(self, pictures: Sequence[Image], noise: Tensor, noise_level: int) -> Tensor:
        """One picture for all or one for each, noise [B,D], noise_level 0..noisiest -> [B,2D], what the network is told."""
        if not 0 <= noise_level <= self.noisiest:
            raise UsageError(f"noise_level is {noise_level}; this model takes 0 to {self.noisiest}")
        return self.noised(self.seen(pictures), noise, noise_level)

    def seen(self, pictures: Sequence[Image]) -> Tensor:
        """Pictures as their vectors, [N,D]."""
        return self.tower.embeds(self.tower.pixels(pictures)).float()

    def noised(self, seen: Tensor, noise: Tensor, noise_level: int) -> Tensor:
        """Vectors [B,D] (or one for all), noise [B,D] -> [B,2D]: the vector, whitened, mixed with noise and brought back, and
        behind it cosines and sines of the noise level."""
        mean, std = self.mean.to(noise), self.std.to(noise)
        noised = self.path.level(noise_level).mix((seen.to(noise) - mean) / std, noise) * std + mean
        return torch.cat([noised, waves(noise_level, self.width).to(noise).expand(len(noise), -1)], dim=1)


def waves(time: float, width: int) -> Tensor:
    """[width]: cosines, then sines, of a time (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    half = width // 2
    angles = time * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()]), (0, width % 2))


class _Normal(nn.Module):
    """mean and std [1,D], as the file has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.empty(1, width)) for _ in range(2))


def _vectors(parts: Parts) -> Vectors:
    place = parts.folder / "image_normalizer"
    width = read_json(place / "config.json").get("embedding_dim", 768)
    tower = vision(parts.folder / "image_encoder", parts.folder / "feature_extractor")
    if width != tower.encoder.config.projection_dim:
        seen = tower.encoder.config.projection_dim
        raise ModelError(f"{place.parent.name}/{place.name}: embedding_dim is {width!r:.40}; the image encoder gives {seen}")
    normal = weights.read(place / WEIGHTS["diffusers"], 2, lambda: _Normal(width))
    path, _ = path_of(read_json(parts.folder / "image_noising_scheduler" / "scheduler_config.json"), "image_noising_scheduler")
    return Vectors(tower, normal.mean, normal.std, path)


def assemble(parts: Parts) -> Made:
    """The bundle of a folder with an image encoder and what its vectors are normalised and noised by."""
    unet, vectors = parts.network("unet"), _vectors(parts)
    told = unet.config.projection_class_embeddings_input_dim
    if unet.config.class_embed_type != "projection" or told != 2 * vectors.width:
        wanted = f"with class_embed_type projection and this image encoder it takes {2 * vectors.width}"
        raise ModelError(f"unet/config.json: projection_class_embeddings_input_dim is {told}; {wanted}")
    return plain.assemble(parts)._replace(network=UnCLIP(unet, parts.guidance), vectors=vectors)
