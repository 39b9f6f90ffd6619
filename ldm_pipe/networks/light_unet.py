"""The cross-attention U-Net in torch alone, with the configuration and the weight names of diffusers' UNet2DConditionModel.

Rombach et al. 2022, arXiv 2112.10752, section 3.3 and appendix E.2.1;
conditions added to the time: SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.blocks import Conv2d, Down, Linear, Up, attend
from ldm_pipe.networks.stages import DownStage, MidStage, Shape, UpStage

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Config:
    """What config.json may ask for, with the defaults of its class; `neutral`: what may be said but not changed.

    `attention_head_dim` is, as in every published file, the number of heads. `upcast_attention` changes nothing: the fused
    kernel keeps its sums in fp32.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[Literal["DownBlock2D", "CrossAttnDownBlock2D"], ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)  # type: ignore[assignment]  # fmt: skip
    up_block_types: tuple[Literal["UpBlock2D", "CrossAttnUpBlock2D"], ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)  # type: ignore[assignment]  # fmt: skip
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_cond_proj_dim: int | None = None
    addition_embed_type: Literal["text", "text_time"] | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    sample_size: int | tuple[int, ...] | None = None
    upcast_attention: bool = False

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("center_input_sample", "only_cross_attention", "dual_cross_attention"), (False,)),
        **dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat"), (False,)),
        **dict.fromkeys(("encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads", "class_embed_type"), (None,)),
        **dict.fromkeys(("num_class_embeds", "time_embedding_dim", "time_embedding_act_fn"), (None,)),
        **dict.fromkeys(("timestep_post_act", "cross_attention_norm", "reverse_transformer_layers_per_block"), (None,)),
        **dict.fromkeys(("downsample_padding", "mid_block_scale_factor", "resnet_out_scale_factor"), (1,)),
        **dict.fromkeys(("conv_in_kernel", "conv_out_kernel"), (3,)),
        "dropout": (0,), "act_fn": ("silu", "swish"), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "time_embedding_type": ("positional",), "attention_type": ("default",), "mid_block_only_cross_attention": (None, False),
    }  # fmt: skip

    def __post_init__(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        widths, layers, depths, heads = self.blocks()
        if not widths or len({len(x) for x in (widths, layers, depths, heads, self.down_block_types, self.up_block_types)}) > 1:
            raise ValueError("the lists of the blocks differ in length")
        if any(n == 0 and widths[i] != widths[max(i - 1, 0)] for i, n in enumerate(layers)):
            raise ValueError("a block without layers cannot change the channels")
        pooled = self.addition_embed_type == "text" and self.cross_attention_dim % self.addition_embed_type_num_heads
        if pooled or widths[0] % 2 or any(w % h for w, h in zip(widths, heads, strict=True)):
            raise ValueError("the heads do not divide the channels")
        if self.addition_embed_type == "text_time":
            if not self.addition_time_embed_dim or not self.projection_class_embeddings_input_dim:
                raise ValueError("sizes as conditions need their widths")
            if self.addition_time_embed_dim % 2:
                raise ValueError("an odd width has no sines and cosines")

    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """(channels, layers, depths of the transformers, heads), each one number per block from fine to coarse."""
        values = (self.layers_per_block, self.transformer_layers_per_block, self.attention_head_dim)
        count = len(self.block_out_channels)
        return (self.block_out_channels, *(v if isinstance(v, tuple) else (v,) * count for v in values))

    @property
    def parts(self) -> int:
        """A lower bound of the number of tensors, to compare with the file before anything is built."""
        widths, layers, depths, _ = self.blocks()
        crossed = ["Cross" in kind for kind in self.down_block_types]
        return len(widths) + max(depths) + sum(n * (1 + d * c) for n, d, c in zip(layers, depths, crossed, strict=True))


def sinusoids(time: Tensor, width: int, flip: bool, shift: int) -> Tensor:
    """[N] -> [N, width] in fp32, sines first, or cosines where `flip` (Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - shift))
    angles = time[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()], dim=-1)


class _Vector(nn.Module):
    """[B,inside] -> [B,out]; a second vector [B,extra] joins first, where there is one."""

    def __init__(self, inside: int, out: int, extra: int | None = None) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(inside, out), Linear(out, out)
        self.cond_proj = Linear(extra, inside, bias=False) if extra else None

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and extra is not None:
            x = x + self.cond_proj(extra)
        return self.linear_2(F.silu(self.linear_1(x)))


class _Pool(nn.Module):
    """Tokens [B,L,D] -> [B,D]: their mean, moved by something learned, attends to itself and to all of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(1, width))
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = x.mean(1, keepdim=True) + self.positional_embedding
        x = torch.cat([first, x], dim=1)
        return attend(self.q_proj(first), self.k_proj(x), self.v_proj(x), self.heads)[:, 0]


class _Text(nn.Module):
    """Tokens [B,L,D] -> a vector [B,out] to add to that of the time."""

    def __init__(self, width: int, out: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.pool = nn.LayerNorm(width), _Pool(width, heads)
        self.proj, self.norm2 = Linear(width, out), nn.LayerNorm(out)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(tokens))))


class UNet(nn.Module):
    """x [B,C,H,W], time [B], tokens [B,L,D] -> the network's raw output [B,C,H,W]."""

    down_blocks: Any
    up_blocks: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths, layers, depths, heads = config.blocks()
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _Vector(widths[0], 4 * widths[0], config.time_cond_proj_dim)
        self.add_embedding = self._added()
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        scales = config.resnet_time_scale_shift == "scale_shift"
        time, linear = 4 * widths[0], config.use_linear_projection
        shape = Shape(config.norm_num_groups, config.norm_eps, time, scales, linear, config.cross_attention_dim)
        skips = [widths[0]]
        for i, kind in enumerate(config.down_block_types):
            inside = [widths[max(i - 1, 0)], *[widths[i]] * layers[i]][: layers[i]]
            down = DownStage(shape, inside, widths[i], (depths[i], heads[i]) if kind == CROSS_DOWN else None)
            last = i == len(widths) - 1
            down.downsamplers = nn.ModuleList([] if last else [Down(widths[i])])
            skips += [widths[i]] * (layers[i] + (not last))
            self.down_blocks.append(down)
        self.mid_block = MidStage(shape, [widths[-1]] * 2, widths[-1], (depths[-1], heads[-1]))
        del self.mid_block.attentions[1]  # the second block is not followed by one
        before = widths[-1]
        for i, up_kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            inside = [skips.pop() + (widths[i] if j else before) for j in range(layers[i] + 1)]
            up = UpStage(shape, inside, widths[i], (depths[i], heads[i]) if up_kind == CROSS_UP else None)
            up.upsamplers = nn.ModuleList([Up(widths[i])] if i else [])
            before = widths[i]
            self.up_blocks.append(up)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    def _added(self) -> nn.Module | None:
        c, out = self.config, 4 * self.config.block_out_channels[0]
        if c.addition_embed_type == "text":
            return _Text(c.cross_attention_dim, out, c.addition_embed_type_num_heads)
        return _Vector(c.projection_class_embeddings_input_dim or 0, out) if c.addition_embed_type else None

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor]:
        """(output,). added_cond_kwargs: text_embeds [B,E], time_ids [B,6] (SDXL). timestep_cond: [B,time_cond_proj_dim].

        down_block_additional_residuals, mid_block_additional_residual: join every skip and the middle (ControlNet, Zhang et
        al. 2023, arXiv 2302.05543, section 3.2). more: down_intrablock_additional_residuals, one for each stage on the way
        down; return_dict, which changes nothing.
        """
        tokens, added = encoder_hidden_states, list(more.get("down_intrablock_additional_residuals") or ())
        vector = self._vector(x, time, tokens, timestep_cond, added_cond_kwargs or {})
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down_blocks:
            x, own = stage(x, vector, tokens, added.pop(0) if added else None)
            skips += own
        if down_block_additional_residuals is not None:
            skips = [s + r for s, r in zip(skips, down_block_additional_residuals, strict=True)]
        x = self.mid_block(x, vector, tokens)
        if added and added[0].shape == x.shape:
            x = x + added[0]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        for stage in self.up_blocks:
            count = len(stage.resnets)
            taken, skips = tuple(skips[-count:]), skips[:-count]
            x = stage(x, taken, vector, tokens, skips[-1].shape[2:] if skips else None)
        return (self.conv_out(F.silu(self.conv_norm_out(x))),)

    def _vector(self, x: Tensor, time: Tensor, tokens: Tensor, extra: Tensor | None, added: Mapping[str, Tensor]) -> Tensor:
        """Time and added conditions as one vector [B,4 * channels]."""
        c = self.config
        waves = sinusoids(time.expand(len(x)), c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        vector = self.time_embedding(waves.to(x.dtype), extra)
        if self.add_embedding is None:
            return vector
        if c.addition_embed_type == "text":
            return vector + self.add_embedding(tokens)
        pooled, sizes = added["text_embeds"], added["time_ids"]
        waves = sinusoids(sizes.flatten(), c.addition_time_embed_dim or 0, c.flip_sin_to_cos, c.freq_shift)
        return vector + self.add_embedding(torch.cat([pooled, waves.reshape(len(pooled), -1).to(pooled)], dim=-1).to(x.dtype))
