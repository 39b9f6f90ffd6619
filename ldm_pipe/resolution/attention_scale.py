"""Training-free Diffusion Model Adaptation for Variable-Sized Text-to-Image Synthesis, Jin et al. 2023, arXiv 2306.08645.

More positions than in training spread attention, fewer narrow it. Scaling the logits of self-attention by
sqrt(log_T N / D) in place of sqrt(1 / D) keeps its entropy: N positions now, T in training, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, noting_size


@dataclass(frozen=True)
class AttentionScale(Patch):
    """Keep the entropy of self-attention at other sizes than that of training.

    size: the side of x in training, 0 = what the network's configuration says. strength: 0 = none, 1 = all of it (a power).
    """

    size: int = 0
    strength: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"strength": 0.0}

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the queries of every self-attention, and one around the network, which tells the size of x."""
        names = [n for n, _ in network.named_modules() if n.endswith("attn1.to_q")]
        if not names:
            raise UsageError(f"attention_scale needs self-attention; {type(network).__name__} has no layer attn1.to_q")
        trained = self.size or getattr(getattr(network, "config", None), "sample_size", None)
        if not isinstance(trained, int):
            raise UsageError("attention_scale: this model does not say its size; give it, as attention_scale(64)")
        size: list[int] = []

        def scaled(call: Callable[..., Any], x: Tensor) -> Tensor:
            now, then = x.shape[1], trained**2 * x.shape[1] / (size[0] * size[1])
            if now == then or now < 2 or then < 2 or self.strength == 0:
                return call(x)
            return call(x) * (math.log(now) / math.log(then)) ** (self.strength / 2)

        return dict.fromkeys(names, scaled) | {"": noting_size(size)}
