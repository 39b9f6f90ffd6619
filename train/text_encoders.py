"""Which text encoders of a model learn along, and what of them: CLIPs, as far as a prompt reaches the network through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm_pipe import lora
from ldm_pipe.embedding import towers
from ldm_pipe.errors import UsageError
from ldm_pipe.families import FAMILIES


def clips(bundle: Any) -> dict[str, nn.Module]:
    """The CLIP text encoders of a bundle by the names of their folders. Raises UsageError where it has none.

    T5 and Gemma stay as they are, as the families that have them are trained: they are larger than the network, or nearly.
    """
    own = [tower.encoder for tower in towers(bundle.text)]
    found = {n: m for n, m in lora.encoders(bundle).items() if any(m is encoder for encoder in own)}
    if not found:
        title = FAMILIES[bundle.family].title
        raise UsageError(f"train_text trains text encoders of CLIP's kind, and {title} has none; set it to false")
    return found


def reached(bundle: Any) -> set[int]:
    """The ids of the weights of `clips` that the condition of a prompt depends on: SDXL, for one, takes its first CLIP's states
    before the last layer, and what lies behind them would never have a gradient."""
    weights = [p for encoder in clips(bundle).values() for p in encoder.parameters()]
    before = [p.requires_grad for p in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():  # two tokens are enough to see it
            cond = bundle.text.encode({n: t[:, :2].to(bundle.device) for n, t in bundle.text.ids([""]).items()})
    finally:
        for weight, had in zip(weights, before, strict=True):
            weight.requires_grad_(had)
    seen, found, todo = set(), set(), [t.grad_fn for t in (cond.tokens, cond.pooled) if t is not None]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))  # what a leaf of the graph collects gradients for
            todo += [following for following, _ in node.next_functions]
    return found


def learning(bundle: Any) -> dict[str, nn.Module]:
    """The `clips`, every weight of them that is reached asking for gradients, and no other."""
    found, used = clips(bundle), reached(bundle)
    for encoder in found.values():
        for weight in encoder.parameters():
            weight.requires_grad_(id(weight) in used)
    return found
