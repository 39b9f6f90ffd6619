"""How attention is computed: by torch's fused kernel, by two products and a softmax, by xformers, or by what is fast on a CPU.

softmax(q k^T / sqrt(D)) v, Vaswani et al. 2017, arXiv 1706.03762, eq. 1. Each backend is a function of q [B,heads,L,D] and of
k and v [B,heads,M,D]; `choose` puts one into a network, for as long as the network lives. "fast" also says how the linear
layers multiply: by oneDNN, which reads the weights as they lie, so that nothing is packed ahead, kept twice or to be put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ldm_pipe.errors import EnvironmentFault, UsageError
from ldm_pipe.settings import check_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
QUERIES = 512  # of a block: its scores fit into the cache
ROWS, WORK = 64, 2**20  # rows, and products of two numbers, from which oneDNN's way to multiply is worth its start
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
BF16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # elsewhere it would be an error
# Positions, on both sides, from which one head at a time is faster.
FROM = {torch.bfloat16: 256} | ({torch.float32: 512} if ONEDNN else {})


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax; its backward pass is fast on a CPU at small sizes."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head at a time in blocks of queries, where that wins: on a CPU, many positions, no gradient. There torch's fused
    kernel computes bf16 at the rate of fp32, and fp32 at that of MKL, half of oneDNN's on AMD. Elsewhere the fused kernel.

    bf16: the scores are rounded before the softmax; over a whole U-Net that is no further from fp32 than the fused kernel.
    fp32: 6e-7 of the exact result, relative, where the fused kernel has 4e-7.
    """
    if not _plain(q) or q.dtype not in FROM or min(q.shape[2], k.shape[2]) < FROM[q.dtype]:
        return F.scaled_dot_product_attention(q, k, v)
    batch, heads, length, width = q.shape
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)  # so that joining the heads again moves nothing
    k = k * width**-0.5
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].contiguous(), v[b, h].T.contiguous()
            for i in range(0, length, QUERIES):
                out[b, h, i : i + QUERIES] = _times(torch.softmax(_times(q[b, h, i : i + QUERIES], keys), dim=-1), values)
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,C] @ weight [D,C] ^T + bias by oneDNN where that wins: on a CPU, large, no gradient; else F.linear.

    fp32: more than twice as fast as MKL on AMD, 4e-7 of the exact result where MKL has 2e-7; bf16: up to 1.3 times as fast,
    the same bits where x lies together. No slower than with weights packed ahead (`scripts/bench/engine.py`), which would be
    kept a second time.
    """
    rows = x.numel() // x.shape[-1]
    if rows < ROWS or rows * weight.numel() < WORK or x.dtype != weight.dtype or not (_plain(x) and weight.is_contiguous()):
        return F.linear(x, weight, bias)
    return _times(x, weight, bias)


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if (ONEDNN and x.dtype == torch.float32) or (BF16 and x.dtype == torch.bfloat16):
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


def _plain(x: Tensor) -> bool:
    """On a CPU, and nobody asks for a derivative: oneDNN's has none, and forward mode would take it for zero, unsaid."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and forward_ad._current_level < 0


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The memory-efficient attention of the package xformers (an extra, for GPUs)."""
    from xformers.ops import memory_efficient_attention

    return cast(Tensor, memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2))


BACKENDS: dict[str, Attend] = {"sdpa": F.scaled_dot_product_attention, "math": math, "xformers": xformers, "fast": fast}


def choose(network: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put a backend into a network's attentions, and its weights into the layout that goes with it; the name in force.

    "auto" is "fast" where that can win, on a CPU in bf16 or fp32 in a light network, else "sdpa". Networks of diffusers know
    "sdpa" and "math". Raises UsageError on an unknown name, and EnvironmentFault where xformers is not there.
    """
    check_attention(name)
    light = [m for m in network.modules() if getattr(m, "takes_rules", False)]
    if name == "auto":
        name = "fast" if light and device.type == "cpu" and dtype in FROM else "sdpa"
    if name == "xformers":
        _needs_xformers(device)
    for module in light:
        module.attend = BACKENDS[name]  # type: ignore[assignment]
    for module in (m for m in network.modules() if hasattr(m, "multiply")):
        module.multiply = product if name == "fast" else F.linear  # type: ignore[assignment]
    if light:  # convolutions gain from weights whose channels lie together, in bf16 on a CPU
        apart = name != "fast" or device.type != "cpu" or dtype != torch.bfloat16
        cast(Any, network).to(memory_format=torch.contiguous_format if apart else torch.channels_last)
    foreign = [m for m in network.modules() if hasattr(m, "set_processor")]
    if foreign and name != "sdpa":
        _foreign(foreign, name)
    return name


def _foreign(modules: list[Any], name: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    if name != "math":
        raise UsageError(f"--attention {name}: this model runs in a network of diffusers, which takes sdpa or math")
    for module in modules:
        module.set_processor(AttnProcessor())


def _needs_xformers(device: torch.device) -> None:
    import importlib.util

    if importlib.util.find_spec("xformers") is None:
        raise EnvironmentFault("--attention xformers needs the package xformers: pip install 'ldm_pipe[xformers]'")
    if device.type != "cuda":
        raise EnvironmentFault("--attention xformers needs a GPU; on a CPU there is --attention fast")
