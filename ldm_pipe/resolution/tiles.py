"""MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation, Bar-Tal et al. 2023, arXiv 2302.08113, eq. 5.

The network sees overlapping tiles of the size it was trained on; where tiles overlap, what it says of them is averaged, which
is the closest image to all of them. Panoramas, and images of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run


@dataclass(frozen=True)
class Tiles(Patch):
    """Ask the network about overlapping tiles and average what it says.

    size: side of a tile in latent pixels, 0 = what the network's configuration says. overlap: the share of a tile that it has
    in common with the next at least, 0 to 0.9. An image no larger than a tile is one tile.
    """

    size: int = 0
    overlap: float = 0.5
    neutral: ClassVar[Mapping[str, Any]] = {"size": 4096}

    def __post_init__(self) -> None:
        if self.size < 0 or not 0 <= self.overlap <= 0.9:
            raise UsageError(f"tiles: size takes 0 and above, overlap 0 to 0.9, got {self.size} and {self.overlap}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the network."""
        size = self.size or getattr(getattr(network, "config", None), "sample_size", None)
        if not isinstance(size, int):
            raise UsageError(f"tiles: {type(network).__name__} does not say its size; give it, as tiles(64)")

        def tiled(call: Callable[..., Any], x: Tensor, *args: Any, **given: Any) -> Any:
            height, width = (int(side) for side in x.shape[2:])
            if height <= size and width <= size:
                return call(x, *args, **given)
            total, count, whole = x.new_zeros(0), torch.zeros_like(x[:1, :1]), False
            for top in starts(height, size, self.overlap):
                for left in starts(width, size, self.overlap):
                    here = (..., slice(top, top + size), slice(left, left + size))
                    out = call(x[here], *args, **given)
                    whole, out = isinstance(out, Tensor), out if isinstance(out, Tensor) else out[0]
                    total = total if len(total) else out.new_zeros(len(x), out.shape[1], height, width)
                    total[here] += out
                    count[here] += 1
            return total / count if whole else (total / count,)

        return {"": tiled}


def starts(length: int, size: int, overlap: float) -> list[int]:
    """Where tiles begin: evenly, the first at 0, the last at the end, neighbours sharing at least `overlap` of a tile."""
    if length <= size:
        return [0]
    count = -(-(length - size) // max(1, int(size * (1 - overlap)))) + 1
    return [round(i * (length - size) / (count - 1)) for i in range(count)]
