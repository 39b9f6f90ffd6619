"""Images <-> latents. The codec owns scale and shift, so that everything else sees latents of unit variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor


class Codec(Protocol):
    """images [B,3,H,W] in -1..1 <-> latents [B,channels,H/factor,W/factor] of unit variance. Both ways differentiable."""

    @property
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    def factor(self) -> int:
        """Pixels of an image side per latent pixel."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images (the posterior's mean)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents."""

    def raw(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder itself has them, not of unit variance."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Codec:
        """The same codec elsewhere."""


@dataclass(frozen=True)
class Identity:
    """For networks that live in pixels: images are their own latents."""

    channels: int = 3
    factor: int = 1

    def encode(self, images: Tensor) -> Tensor:
        """The images."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents

    def raw(self, latents: Tensor) -> Tensor:
        """The latents."""
        return latents

    def to(self, device: torch.device, dtype: torch.dtype) -> Identity:
        """Itself."""
        return self


@dataclass(frozen=True, eq=False)
class KLCodec:
    """The KL autoencoder (Rombach et al. 2022, arXiv 2112.10752, section 3.1): the light one or that of diffusers.

    Works in the dtype of its weights, in fp32 where the configuration says `force_upcast` and fp16 would overflow; takes and
    returns the dtype of what it is given.
    """

    vae: Any

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels of an image side per latent pixel."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def _scale_shift(self) -> tuple[float, float]:
        return float(self.vae.config.scaling_factor), float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def encode(self, images: Tensor) -> Tensor:
        """(what the encoder gives - shift) * scale."""
        scale, shift = self._scale_shift
        return (self._encoded(images.to(self.vae.dtype)).to(images.dtype) - shift) * scale

    def _encoded(self, images: Tensor) -> Tensor:
        """The mean of the posterior."""
        return cast(Tensor, self.vae.encode(images, return_dict=False)[0].mean)

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder at latents / scale + shift."""
        return self.vae.decode(self.raw(latents).to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)

    def raw(self, latents: Tensor) -> Tensor:
        """latents / scale + shift."""
        scale, shift = self._scale_shift
        return latents / scale + shift

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same codec elsewhere; fp32 where fp16 is asked of one that must not use it."""
        if dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            dtype = torch.float32
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own warns of what is handled above
        return self


@dataclass(frozen=True, eq=False)
class TinyCodec(KLCodec):
    """The tiny autoencoder of diffusers, distilled from a large one: a fraction of its time, and of its detail.

    TAESD, Boer Bohan 2023, https://github.com/madebyollin/taesd. It takes and gives latents as the network has them: its scale
    is 1 and its shift 0 where its configuration does not say otherwise, whatever those of the large one are.
    """

    def _encoded(self, images: Tensor) -> Tensor:
        """There is no posterior."""
        return cast(Tensor, self.vae.encode(images, return_dict=False)[0])


@dataclass(frozen=True, eq=False)
class DCCodec(TinyCodec):
    """The deep compression autoencoder of diffusers, 32 pixels to one; it has no posterior either, and no shift.

    Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models, Chen et al. 2024, arXiv 2410.10733.
    """

    @property
    def factor(self) -> int:
        """Pixels of an image side per latent pixel."""
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))
