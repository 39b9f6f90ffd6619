"""Exponential moving average of the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """A moving average in fp32. Warm-up: at step s the decay is min(decay, (1 + s) / (10 + s)), so that the average
    forgets the first steps quickly (the schedule of TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {n: t.detach().clone() for n, t in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move the average towards the current weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        state = net.state_dict()
        moving = [n for n, t in state.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.shadow[n] for n in moving], [state[n] for n in moving], 1 - decay)

    @contextlib.contextmanager
    def swapped(self, net: nn.Module) -> Iterator[None]:
        """The average inside `net` for the duration of a `with`; the trained weights come back bit for bit."""
        state = net.state_dict()
        kept = {n: t.detach().clone() for n, t in state.items()}
        try:
            net.load_state_dict(self.shadow)
            yield
        finally:
            net.load_state_dict(kept)
