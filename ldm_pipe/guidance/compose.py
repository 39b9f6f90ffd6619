"""Compositional Visual Generation with Composable Diffusion Models, Liu et al. 2022, arXiv 2206.01714, eq. 11 (`AND`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate


@dataclass(frozen=True)
class Compose:
    """Several conditions at once: u + sum of weight_i (p_i - u). A weight below 0 is the paper's `NOT`.

    positives: names of branches, such as "cond" or "text:a red hat"; weights: one each, or one for all; empty: the branch u,
    which is not evaluated where the weights sum to 1. Linear, so the same in every space.
    """

    positives: tuple[str, ...] = ("cond",)
    weights: tuple[float, ...] = (5.0,)
    empty: str = "uncond"

    def __post_init__(self) -> None:
        if not self.positives or len(self.weights) not in (1, len(self.positives)):
            raise UsageError(f"compose: {len(self.weights)} weights for {len(self.positives)} positives; give one, or one each")

    @property
    def _weights(self) -> dict[str, float]:
        each = self.weights if len(self.weights) == len(self.positives) else self.weights * len(self.positives)
        return dict(zip(self.positives, each, strict=True))

    def needs(self, level: Level) -> tuple[str, ...]:
        """Every positive, and the empty one where it has a weight."""
        return (*self.positives, *([self.empty] if sum(self._weights.values()) != 1 else []))

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The sum; a learned variance is the first positive's."""
        weights = self._weights
        rest = 1 - sum(weights.values())
        parts = [(w, estimates[n]) for n, w in weights.items()] + ([(rest, estimates[self.empty])] if rest else [])
        weight, first = parts[0]
        x0, noise = weight * first.x0, weight * first.noise
        for weight, e in parts[1:]:
            x0, noise = x0 + weight * e.x0, noise + weight * e.noise
        return Estimate(x0, noise, first.log_var)
