"""The KL autoencoder in torch alone, with the configuration and the weight names of diffusers' AutoencoderKL.

Rombach et al. 2022, arXiv 2112.10752, section 3.1 and appendix G; the network is that of
Esser et al. 2021, arXiv 2012.09841, table 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.blocks import Conv2d, Down, Linear, Resnet, Up, attend


@dataclass(frozen=True)
class Config:
    """What config.json may ask for, with the defaults of its class; `neutral`: what may be said but not changed."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu", "swish"),
        "latents_mean": (None,),
        "latents_std": (None,),
    }

    def __post_init__(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        if not self.block_out_channels or self.layers_per_block < 1:
            raise ValueError("there are no blocks")
        if len({len(x) for x in (self.block_out_channels, self.down_block_types, self.up_block_types)}) > 1:
            raise ValueError("the lists of the blocks differ in length")
        if not math.isfinite(self.scaling_factor) or self.scaling_factor == 0:
            raise ValueError("latents cannot be scaled by this")

    @property
    def parts(self) -> int:
        """A lower bound of the number of tensors, to compare with the file before anything is built."""
        return len(self.block_out_channels) * self.layers_per_block


def renamed(name: str) -> str:
    """The present name of a tensor: early files name the parts of the attention otherwise."""
    old = re.fullmatch(r"(.+\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", name)
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{old[1]}.{new[old[2]]}.{old[3]}" if old else name


class _Attention(nn.Module):
    """Every position of x [B,C,H,W] attends to every other, one head; added to x."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = self.to_out(attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class _Stage(nn.Module):
    """Resnets of one resolution, with what comes after: attention after the first, or a change of size after the last."""

    def __init__(self, inside: int, out: int, layers: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(out if i else inside, out, groups) for i in range(layers))
        self.attentions, self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        for change in (*self.downsamplers, *self.upsamplers):
            x = change(x)
        return x


def _middle(config: Config) -> _Stage:
    width, groups = config.block_out_channels[-1], config.norm_num_groups
    stage = _Stage(width, width, 2, groups)
    if config.mid_block_add_attention:
        stage.attentions.append(_Attention(width, groups))
    return stage


class _Encoder(nn.Module):
    """Images [B,3,H,W] -> mean and log-variance [B,2C,H/f,W/f]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        stages = [_Stage(a, b, config.layers_per_block, groups) for a, b in zip(widths[:1] + widths, widths, strict=False)]
        for stage, width in zip(stages[:-1], widths, strict=False):
            stage.downsamplers.append(Down(width, end=True))
        self.down_blocks, self.mid_block = nn.ModuleList(stages), _middle(config)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block):
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _Decoder(nn.Module):
    """Latents [B,C,h,w] -> images [B,3,h*f,w*f]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        stages = [_Stage(a, b, config.layers_per_block + 1, groups) for a, b in zip(widths[:1] + widths, widths, strict=False)]
        for stage, width in zip(stages[:-1], widths, strict=False):
            stage.upsamplers.append(Up(width))
        self.mid_block, self.up_blocks = _middle(config), nn.ModuleList(stages)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for stage in (self.mid_block, *self.up_blocks):
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Posterior(NamedTuple):
    """The Gaussian over latents that an image gives: mean and log-variance, each [B,C,h,w]."""

    mean: Tensor
    logvar: Tensor


class VAE(nn.Module):
    """Images [B,3,H,W] in -1..1 <-> raw latents [B,C,H/f,W/f]; scale and shift are the codec's. f = 2^(blocks - 1)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, latent = config, config.latent_channels
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.conv_in.weight.dtype

    def encode(self, images: Tensor, return_dict: bool = False) -> tuple[Posterior]:
        """(posterior,), the log-variance held within -30..20."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return (Posterior(mean, logvar.clamp(-30, 20)),)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """(images,)."""
        return (self.decoder(self.post_quant_conv(latents)),)
