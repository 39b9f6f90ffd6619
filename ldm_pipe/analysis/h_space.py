"""Directions in h-space, the features in the middle of a U-Net, along which images change in one respect.

Diffusion Models Already Have a Semantic Latent Space, Kwon et al. 2022, arXiv 2210.10960 (the space); Discovering
Interpretable Directions in the Semantic Latent Space of Diffusion Models, Haas et al. 2023, arXiv 2303.11073, section 4 (the
principal components of many samples, the singular vectors of the Jacobian of one, and the difference of two groups).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError, check_interval
from ldm_pipe.level import inside
from ldm_pipe.patch import Change, Patch, Run, matching


@dataclass(frozen=True, eq=False)
class HSpace(Patch):
    """Add scale * direction to the middle features.

    direction: [C,h,w], or [steps,C,h,w], one for each step. It acts while the noise u is in lo <= u < hi (hi = 1 includes
    u = 1), on every branch alike, as guidance asks for. layer: another one that gives [B,C,h,w], where the middle says little.
    """

    direction: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    layer: str = "mid_block"
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("h_space", self.lo, self.hi)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the middle."""
        matching(network, [self.layer])
        if self.direction.ndim == 4 and len(self.direction) != run.steps:
            raise UsageError(f"h_space: the direction is for {len(self.direction)} steps, the walk has {run.steps}")

        def moved(call: Callable[..., Any], *args: Any, **given: Any) -> Tensor:
            h: Tensor = call(*args, **given)
            level = ROWS.get().level
            if self.scale == 0 or not inside(level, self.lo, self.hi):
                return h
            direction = self.direction[run.index(level)] if self.direction.ndim == 4 else self.direction
            if direction.shape != h.shape[1:]:
                raise UsageError(f"h_space: the direction is {tuple(direction.shape)}, the middle {tuple(h.shape[1:])}")
            return h + self.scale * direction.to(h)

        return {self.layer: moved}


@dataclass(frozen=True, eq=False)
class Watching(Patch):
    """Keep the features of one branch, of the middle or another layer: `kept` grows by a [B,C,h,w] with every evaluation."""

    kept: list[Tensor]
    branch: str = "cond"
    layer: str = "mid_block"

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the middle."""

        def watched(call: Callable[..., Any], *args: Any, **given: Any) -> Tensor:
            h: Tensor = call(*args, **given)
            rows = ROWS.get().of(self.branch)
            if rows is not None:
                self.kept.append(h[rows].detach().clone())
            return h

        return {self.layer: watched}


def principal(h: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(directions [count,...] of unit length, deviations [count]) of samples [N,...]: their principal components."""
    flat = h.flatten(1).double()
    _, s, v = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    if count > len(s):
        raise UsageError(f"{len(flat)} samples have at most {len(s)} directions, got {count}")
    return v[:count].unflatten(1, h.shape[1:]).to(h), (s[:count] / max(1, len(flat) - 1) ** 0.5).to(h)


def difference(with_it: Tensor, without: Tensor) -> Tensor:
    """[N,...] and [M,...] -> [...]: the mean of one group less that of the other."""
    return with_it.mean(0) - without.mean(0)


def apart(direction: Tensor, *others: Tensor) -> Tensor:
    """A direction less what lies in the span of others, so that it moves none of them."""
    basis = torch.linalg.qr(torch.stack([o.flatten() for o in others]).T)[0]
    flat = direction.flatten()
    return (flat - basis @ (basis.T @ flat)).reshape(direction.shape)


def jacobian_directions(f: Callable[[Tensor], Tensor], h: Tensor, count: int, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """(directions [count,...], singular values [count]) that move f(h) most: subspace iteration on J^T J, which needs products
    with J alone. f: from the features of one sample [...] to what is looked at (the estimate, or a masked part of it)."""
    generator = torch.Generator(h.device).manual_seed(0)
    v = torch.linalg.qr(torch.randn(h.numel(), count, generator=generator, dtype=h.dtype, device=h.device))[0]
    back: Callable[..., Any] = torch.func.vjp(f, h)[1]
    values = torch.zeros(count, dtype=h.dtype, device=h.device)
    for _ in range(rounds):
        pushed = [torch.func.jvp(f, (h,), (column.reshape(h.shape),))[1] for column in v.T]
        pulled = torch.stack([back(p)[0].flatten() for p in pushed], dim=1)
        v, squares, _ = torch.linalg.svd(pulled, full_matrices=False)
        values = squares.sqrt()
    return v.T.unflatten(1, h.shape), values
