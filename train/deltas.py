"""Adapters that are no plain sum of two small layers: DoRA, LoHa, LoKr and OFT, by the equations of `ldm_pipe.lora_delta`.

What is trained is what is read back: one function makes the weight of both. Each begins as peft begins it, and as nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe import lora_delta
from ldm_pipe.errors import UsageError

KINDS = ("dora", "loha", "lokr", "oft")


class Delta(nn.Module):
    """What a layer's output is given beside it: that of the change of its weight, nothing at first.

    leaves: the tensors that learn, by the names of `lora_names.LEAVES`. rank, alpha: as of a low-rank branch; of LoKr alpha is
    the rank where both factors are whole, and of OFT the rank is the side of the blocks that turn.
    """

    def __init__(self, kind: str, layer: Any, rank: int, alpha: float) -> None:
        super().__init__()
        self.leaves = nn.ParameterDict(begun(kind, layer.weight.detach(), rank))
        self.rank, self.alpha = rank, alpha
        if kind == "lokr" and {"lokr_w1", "lokr_w2"} <= set(self.leaves):
            self.alpha = float(rank)
        self.layer = [layer]  # in a list: no module of this one

    def forward(self, x: Tensor) -> Tensor:
        """x as the layer is given it -> [..., out], or [B,out,H,W]."""
        layer = self.layer[0]
        with torch.autocast(x.device.type, enabled=False):  # the difference is small beside the weight
            weight = layer.weight.detach().float()
            delta = lora_delta.changed(weight, dict(self.leaves), 1.0, self.alpha) - weight
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, delta.to(x.dtype), None, layer.stride, layer.padding, layer.dilation)
        return F.linear(x, delta.to(x.dtype))

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by the names of `lora_names.LEAVES`."""
        return dict(self.leaves)

    def beside(self, layer: nn.Module) -> Any:
        """Add this to a layer's output; the handle takes it off."""
        return layer.register_forward_hook(lambda _, given, out: out + self(given[0]))


def begun(kind: str, weight: Tensor, rank: int) -> dict[str, nn.Parameter]:
    """The first tensors of a layer with a weight [out,in] or [out,in,k,k]. Raises UsageError where the rank does not fit."""
    out, inner, width = len(weight), weight.shape[1], weight[0].numel()
    if kind == "dora":
        ones = (1, 1) if weight.ndim == 4 else ()
        made = {"down": _drawn(rank, *weight.shape[1:]), "up": torch.zeros(out, rank, *ones)}
        made["magnitude"] = weight.float().flatten(1).norm(dim=1)
    elif kind == "loha":
        made = {"hada_w1_a": _drawn(out, rank), "hada_w1_b": _drawn(rank, width)}
        made |= {"hada_w2_a": _drawn(out, rank), "hada_w2_b": torch.zeros(rank, width)}
    elif kind == "lokr":
        (rows, many), (columns, more) = _factors(out), _factors(inner)
        made = {"lokr_w1": torch.zeros(rows, columns)}
        if rank < max(many, more) / 2:
            made |= {"lokr_w2_a": _drawn(many, rank), "lokr_w2_b": _drawn(rank, more * width // inner)}
        else:
            made["lokr_w2"] = _drawn(many, more, *weight.shape[2:])
    else:
        if rank < 2 or width % rank:
            sides = ", ".join(str(n) for n in range(2, 65) if width % n == 0)
            raise UsageError(f"oft turns {width} inputs in blocks of rank {rank}; it takes a divisor, such as {sides or width}")
        made = {"rotation": torch.zeros(width // rank, rank * (rank - 1) // 2)}
    return {name: nn.Parameter(tensor.to(weight.device)) for name, tensor in made.items()}


def _drawn(*shape: int) -> Tensor:
    drawn = torch.empty(shape)
    nn.init.kaiming_uniform_(drawn, a=5**0.5)
    return drawn


def _factors(size: int) -> tuple[int, int]:
    """The two factors of a number that lie closest, the smaller first."""
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small
