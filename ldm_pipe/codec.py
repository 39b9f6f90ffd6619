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
        scale, shift = self._scale_shift
        return self.vae.decode((latents / scale + shift).to(self.vae.dtype), return_dict=False)[0].to(latents.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> KLCodec:
        """The same codec elsewhere; fp32 where fp16 is asked of one that must not use it."""
        if dtype == torch.float16 and self.vae.config.force_upcast:
            dtype = torch.float32
        torch.nn.Module.to(self.vae, device=device, dtype=dtype)  # diffusers' own warns of what is handled above
        return self
