"""How attention is computed: by torch's fused kernel, by two products and a softmax, by xformers, or by what is fast on a CPU.

softmax(q k^T / sqrt(D)) v, Vaswani et al. 2017, arXiv 1706.03762, eq. 1. Each backend is a function of q [B,heads,L,D] and of
k and v [B,heads,M,D]; `choose` puts one into a network, for as long as the network lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.errors import EnvironmentFault, UsageError
from ldm_pipe.settings import check_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
QUERIES = 512  # of a block: its scores fit into the cache
FROM = 256  # positions, on both sides, from which one head at a time is faster


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax; its backward pass is fast on a CPU at small sizes."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head at a time in blocks of queries, where that wins: bf16 on a CPU, many positions, no gradient. There torch's fused
    kernel runs at the rate of fp32, plain matrix products at that of bf16. Elsewhere the fused kernel.

    The scores are rounded to bf16 before the softmax; over a whole U-Net that is no further from fp32 than the fused kernel.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or torch.is_grad_enabled() or min(q.shape[2], k.shape[2]) < FROM:
        return F.scaled_dot_product_attention(q, k, v)
    batch, heads, length, width = q.shape
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)  # so that joining the heads again moves nothing
    k = k * width**-0.5
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].T, v[b, h]
            for i in range(0, length, QUERIES):
                out[b, h, i : i + QUERIES] = torch.softmax(q[b, h, i : i + QUERIES] @ keys, dim=-1) @ values
    return out


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The memory-efficient attention of the package xformers (an extra, for GPUs)."""
    from xformers.ops import memory_efficient_attention

    return cast(Tensor, memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2))


BACKENDS: dict[str, Attend] = {"sdpa": F.scaled_dot_product_attention, "math": math, "xformers": xformers, "fast": fast}


def choose(network: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put a backend into a network's attentions, and its weights into the layout that goes with it; the name in force.

    "auto" is "fast" where that can win, on a CPU in bf16 in a light network, else "sdpa". Networks of diffusers know "sdpa" and
    "math". Raises UsageError on an unknown name, and EnvironmentFault where xformers is not there.
    """
    check_attention(name)
    light = [m for m in network.modules() if getattr(m, "takes_rules", False)]
    if name == "auto":
        name = "fast" if light and device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"
    if name == "xformers":
        _needs_xformers(device)
    for module in light:
        module.attend = BACKENDS[name]  # type: ignore[assignment]
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
