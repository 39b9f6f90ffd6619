"""Stable Diffusion 1 and 2: the cross-attention U-Net as a Network, the light one or diffusers'.

High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al. 2022, arXiv 2112.10752, section 3.3. With further
channels behind x: inpainting (9) and InstructPix2Pix (8; Brooks et al. 2022, arXiv 2211.09800, section 3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.errors import ModelError
from ldm_pipe.parts import Made, Parts
from ldm_pipe.text import ClipText

LARGEST = 2048  # pixels of a side that a configuration may ask for where nobody does


class UNet(nn.Module):
    """A cross-attention U-Net. `unet`: a light UNet or a UNet2DConditionModel; its time is the path's (0..T-1, or u * 1000).

    guidance: the scale that a network is told which wants to be told one, where `cond.extras["guidance"]` [B] gives none.
    factor: pixels of an image side per latent pixel.
    """

    def __init__(self, unet: Any, guidance: float = 7.5, factor: int = 8) -> None:
        super().__init__()
        self.unet, self.guidance, self.factor = unet, guidance, factor

    def forward(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x [B,C,H,W] (with cond.channels joined behind it), time [B], tokens [B,L,D] -> [B,C,H,W]."""
        if cond.channels is not None:
            x = torch.cat([x, cond.channels.to(x)], dim=1)
        assert cond.tokens is not None
        given: dict[str, Any] = {"encoder_hidden_states": cond.tokens.to(x.dtype), **self.added(x, cond)}
        if self.embeds:
            scale = cond.extras.get("guidance", x.new_full((len(x),), self.guidance, dtype=torch.float32))
            given["timestep_cond"] = waves(scale, self.unet.config.time_cond_proj_dim).to(x.dtype)
        return self.unet(x, time, return_dict=False, **given)[0]

    @property
    def embeds(self) -> bool:
        """Is the network told the guidance scale?"""
        return self.unet.config.time_cond_proj_dim is not None

    def added(self, x: Tensor, cond: Cond) -> dict[str, Any]:
        """What else the network is given of x and its condition."""
        return {}


def waves(scale: Tensor, width: int) -> Tensor:
    """Guidance scales [B] as sines and cosines [B, width] of 1000 (scale - 1), in fp32.

    On Distillation of Guided Diffusion Models, Meng et al. 2022, arXiv 2210.03142, section 3.1; as in Latent Consistency
    Models, Luo et al. 2023, arXiv 2310.04378.
    """
    half = width // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, dtype=torch.float32, device=scale.device))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def assemble(parts: Parts) -> Made:
    """The bundle of a folder whose text encoder is one CLIP."""
    unet, codec, tower = parts.network("unet"), parts.codec(), parts.clip()
    network = UNet(unet, parts.guidance)
    text = ClipText(tower.encoder, tower.tokenizer, frozenset(parts.words) or None)
    side = unet.config.sample_size  # of the latents that it was trained on
    size = {"size": (side * codec.factor,) * 2} if isinstance(side, int) and 0 < side * codec.factor <= LARGEST else {}
    return Made(network, text, codec, embeds=network.embeds, inserts=inserted(unet, codec.channels), defaults=size)


def inserted(unet: Any, channels: int) -> str | None:
    """What of a picture the network takes behind x. Raises ModelError on a number of channels that is none of the known."""
    known = {channels: None, 2 * channels + 1: "masked", 2 * channels: "picture"}  # a picture's latents, and their mask
    if unet.config.in_channels not in known:
        words = f"for this autoencoder it takes {', '.join(map(str, known))}"
        raise ModelError(f"unet/config.json: in_channels is {unet.config.in_channels}; {words}")
    return known[unet.config.in_channels]
