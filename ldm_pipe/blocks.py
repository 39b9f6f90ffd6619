"""What the light networks are made of. The names of the weights are those of diffusers' files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import ruled, split


class Linear(nn.Linear):
    """nn.Linear whose weights come from a file.

    Drawing them first would waste time, most of all on the meta device, where it imports a whole compiler (0.8 s).
    """

    multiply = staticmethod(F.linear)  # `ldm_pipe.backends` puts another in its place

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...,inside] -> [...,out]."""
        return self.multiply(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weights come from a file: see Linear."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Embedding(nn.Embedding):
    """nn.Embedding whose weights come from a file: see Linear."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Attention of several heads (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): q [B,L,C], k and v [B,M,C] -> [B,L,C]."""
    q, k, v = (split(t, heads) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Resnet(nn.Module):
    """x [B,inside,H,W] -> [B,out,H,W], added to itself (He et al. 2016, arXiv 1603.05027, figure 1b).

    A time [B,time] shifts what lies between the two convolutions, or where `scales` scales and shifts it (Dhariwal and
    Nichol 2021, arXiv 2105.05233, eq. 2).
    """

    def __init__(
        self, inside: int, out: int, groups: int, eps: float = 1e-6, time: int | None = None, scales: bool = False
    ) -> None:
        super().__init__()
        self.scales = scales
        self.norm1, self.conv1 = nn.GroupNorm(groups, inside, eps), Conv2d(inside, out, 3, padding=1)
        self.time_emb_proj = Linear(time, out * (2 if scales else 1)) if time else None
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, eps), Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """One block."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is None or time is None:
            h = self.norm2(h)
        elif self.scales:
            scale, shift = self.time_emb_proj(F.silu(time))[:, :, None, None].chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + self.time_emb_proj(F.silu(time))[:, :, None, None])
        return self.conv_shortcut(x) + self.conv2(F.silu(h))


class Down(nn.Module):
    """[B,C,H,W] -> [B,C,H/2,W/2] by a convolution, padded on all sides or, where `end`, below and to the right only."""

    def __init__(self, width: int, end: bool = False) -> None:
        super().__init__()
        self.end = end
        self.conv = Conv2d(width, width, 3, stride=2, padding=0 if end else 1)

    def forward(self, x: Tensor) -> Tensor:
        """Half the size."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.end else x)


class Up(nn.Module):
    """[B,C,H,W] -> [B,C,2H,2W], or the given size, by the nearest neighbour and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """Twice the size; `size` (H, W) of an odd image that was halved before."""
        return self.conv(F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


class Attention(nn.Module):
    """x [B,L,C] attends to y [B,M,D], or to itself -> [B,L,C]. A rule of `ldm_pipe.attention` may change it."""

    takes_rules = True
    attend = staticmethod(F.scaled_dot_product_attention)  # `ldm_pipe.backends` puts another in its place

    def __init__(self, width: int, other: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k, self.to_v = (Linear(other, width, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(Linear(width, width))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The attended values, projected."""
        source = x if y is None else y
        q, k = (split(t, self.heads) for t in (self.to_q(x), self.to_k(source)))
        out = ruled(self, y is not None, (q, k, self.values(source)), self.attend, self.values)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def values(self, y: Tensor) -> Tensor:
        """[B,M,D] -> [B,heads,M,C/heads]."""
        return split(self.to_v(y), self.heads)


class GEGLU(nn.Module):
    """[...,C] -> [...,4C], gated (Shazeer 2020, arXiv 2002.05202, section 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """The first half, gated by the second."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Layer(nn.Module):
    """x [B,L,C] attends to itself, then to the tokens [B,M,D]; then each position passes a small network alone."""

    def __init__(self, width: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, tokens, heads)
        self.ff = nn.ModuleDict({"net": nn.Sequential(GEGLU(width), nn.Identity(), Linear(4 * width, width))})

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """One layer."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), tokens)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """An image [B,C,H,W] as H*W positions through layers, added to itself (Rombach et al. 2022, arXiv 2112.10752,
    appendix E.2.1). linear: the two projections come inside the change of shape instead of outside."""

    def __init__(self, width: int, groups: int, linear: bool, depth: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = (Linear(width, width) if linear else Conv2d(width, width, 1) for _ in range(2))
        self.transformer_blocks = nn.ModuleList(Layer(width, tokens, heads) for _ in range(depth))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """tokens: [B,M,D]."""
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).transpose(1, 2)) if self.linear else self.proj_in(h).flatten(2).transpose(1, 2)
        for layer in self.transformer_blocks:
            h = layer(h, tokens)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + (h if self.linear else self.proj_out(h))
