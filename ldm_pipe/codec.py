"""Images <-> latents. The codec owns scale and shift, so that everything else sees latents of unit variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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
        return float(self.vae.config.scaling_factor), float(self.vae.config.shift_factor or 0.0)

    def encode(self, images: Tensor) -> Tensor:
        """(mean of the posterior - shift) * scale."""
        scale, shift = self._scale_shift
        return (self.vae.encode(images.to(self.vae.dtype), return_dict=False)[0].mean.to(images.dtype) - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder at latents / scale + shift."""
        return self.vae.decode(self.raw(latents).to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)

    def raw(self, latents: Tensor) -> Tensor:
        """latents / scale + shift."""
        scale, shift = self._scale_shift
        return latents / scale + shift

    def to(self, device: torch.device, dtype: torch.dtype) -> KLCodec:
        """The same codec elsewhere; fp32 where fp16 is asked of one that must not use it."""
        if dtype == torch.float16 and self.vae.config.force_upcast:
            dtype = torch.float32
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own warns of what is handled above
        return self


@dataclass(frozen=True, eq=False)
class DCCodec:
    """The deep compression autoencoder of diffusers, 32 pixels to one.

    Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models, Chen et al. 2024, arXiv 2410.10733.
    """

    vae: Any

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels of an image side per latent pixel."""
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def encode(self, images: Tensor) -> Tensor:
        """The encoder's output, scaled."""
        latents = self.vae.encode(images.to(self.vae.dtype), return_dict=False)[0]
        return latents.to(images.dtype) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder at latents / scale."""
        return self.vae.decode(self.raw(latents).to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)

    def raw(self, latents: Tensor) -> Tensor:
        """latents / scale."""
        return latents / self.vae.config.scaling_factor

    def to(self, device: torch.device, dtype: torch.dtype) -> DCCodec:
        """The same codec elsewhere."""
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)
        return self
