"""Memory for time: the blocks of a network forget what is inside them and compute it again on the way back.

Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016, arXiv 1604.06174. The gradients are the same bit for bit.
"""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm_pipe.errors import UsageError

# Of the light networks, and of diffusers and transformers.
BLOCKS = frozenset({
    "Resnet", "Transformer", "ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock", "JointTransformerBlock",
    "FluxTransformerBlock", "FluxSingleTransformerBlock", "CLIPEncoderLayer", "_Layer",
})  # fmt: skip


def use(network: nn.Module) -> int:
    """Checkpoint every outermost block of a network, in place. Returns how many. Raises UsageError where there is none."""
    found = _outermost(network)
    for block in found:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    if not found:
        raise UsageError(f"gradient checkpointing knows no block of {type(network).__name__}")
    return len(found)


def _outermost(module: nn.Module) -> list[nn.Module]:
    if type(module).__name__ in BLOCKS:
        return [module]
    return [block for child in module.children() for block in _outermost(child)]
