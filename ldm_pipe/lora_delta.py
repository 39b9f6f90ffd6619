"""What an adapter adds to one layer's weight, from the few small tensors that a file holds of it.

LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv 2106.09685, section 4.1: W + alpha / r * B A, with the
convolutions of LoCon; LoHa and LoKr: Navigating Text-To-Image Customization (LyCORIS), Yeh et al. 2023, arXiv 2309.14859,
section 3.2; DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024, arXiv 2402.09353, eq. 5; OFT: Controlling
Text-to-Image Diffusion by Orthogonal Finetuning, Qiu et al. 2023, arXiv 2306.07280, section 3.3, on the inputs as peft has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = (
    {"down", "up"}, {"down", "up", "mid"}, {"whole"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"rotation"},
    *({*one, *two} for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")) for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
)  # fmt: skip


def changed(weight: Tensor, leaves: Mapping[str, Tensor], scale: float, alpha: float | None = None) -> Tensor:
    """A layer's weight [out, in] or [out, in, k, k] under an adapter, in fp32. alpha: where the file holds none beside it.

    Raises ValueError where the tensors do not fit each other or the weight.
    """
    held = {n: t.float().to(weight.device) for n, t in leaves.items()}
    own = held.pop("alpha", None)
    magnitude, dora_scale = held.pop("magnitude", None), held.pop("dora_scale", None)
    if set(held) not in KINDS:
        raise ValueError(f"it holds {', '.join(sorted(held)) or 'no tensor'}, which is no whole adapter")
    alpha = alpha if own is None else float(own)
    try:
        if "rotation" in held:
            return _turned(weight.float(), held["rotation"] * scale)
        whole, rank = _delta(held, weight)
        delta = whole.reshape(weight.shape) * (scale * (1.0 if alpha is None or not rank else alpha / rank))
    except RuntimeError as error:
        raise ValueError(f"its tensors do not fit a weight of {'x'.join(map(str, weight.shape))}") from error
    moved = weight.float() + delta
    if dora_scale is not None and len(dora_scale) == 1 < len(weight):  # LyCORIS has lengths of outputs, and of inputs
        return _resized(moved.transpose(0, 1), dora_scale).transpose(0, 1)
    magnitude = dora_scale if magnitude is None else magnitude
    return moved if magnitude is None else _resized(moved, magnitude)


def _resized(moved: Tensor, magnitude: Tensor) -> Tensor:
    """A weight whose rows have these lengths. The lengths that it had count as constants for gradients (DoRA, section 4.3)."""
    if magnitude.numel() != len(moved):
        raise ValueError(f"it holds {magnitude.numel()} magnitudes for {len(moved)} outputs")
    length = moved.flatten(1).norm(dim=1).detach()
    return moved * (magnitude.flatten() / length).reshape(-1, *[1] * (moved.ndim - 1))


def _turned(weight: Tensor, generator: Tensor) -> Tensor:
    """A weight behind rotations of its inputs: blocks (1 - Q) (1 + Q)^-1, Q skew with `generator` [blocks, b (b - 1) / 2] above
    its diagonal. A multiple of Q is a part of the way, and its negative the way back."""
    blocks, entries = generator.shape
    side = (1 + math.isqrt(1 + 8 * entries)) // 2
    flat = weight.flatten(1)
    if side * (side - 1) // 2 != entries or blocks * side != flat.shape[1]:
        raise RuntimeError("other sides")
    rows, columns = torch.triu_indices(side, side, 1, device=weight.device)
    upper = generator.new_zeros(blocks, side, side)
    upper[:, rows, columns] = generator
    skew, one = upper - upper.mT, torch.eye(side, device=weight.device).expand(blocks, side, side)
    rotation = torch.linalg.solve(one + skew, one - skew, left=False)
    return torch.einsum("obk,bjk->obj", flat.reshape(-1, blocks, side), rotation).reshape(weight.shape)


def _delta(held: Mapping[str, Tensor], weight: Tensor) -> tuple[Tensor, int]:
    """(what is added, before its scale; the rank that divides alpha, 0 where the adapter has none)."""
    if "whole" in held:
        return held["whole"], 0
    if "mid" in held:
        up, down = held["up"].flatten(1), held["down"].flatten(1)
        return torch.einsum("om,mnkl,ni->oikl", up, held["mid"], down), len(down)
    if "up" in held:
        if held["up"].flatten(1).shape[0] != weight.shape[0] or held["down"].shape[1] != weight.shape[1]:
            raise RuntimeError("other sides")
        return held["up"].flatten(1) @ held["down"].flatten(1), len(held["down"])
    if "hada_w1_a" in held:
        one, two = held["hada_w1_a"] @ held["hada_w1_b"], held["hada_w2_a"] @ held["hada_w2_b"]
        return one * two, len(held["hada_w1_b"])
    factors, rank = [], 0
    for side in ("lokr_w1", "lokr_w2"):
        if side in held:
            factors.append(held[side])
        else:
            rank = len(held[f"{side}_b"])
            factors.append(held[f"{side}_a"] @ held[f"{side}_b"].flatten(1))
    return torch.kron(factors[0], factors[1].flatten(1)), rank
