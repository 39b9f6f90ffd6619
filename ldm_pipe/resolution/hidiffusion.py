"""HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion Models, Zhang et al. 2023.

arXiv 2311.17528. Resolution-aware U-Net (section 3.2): in the first steps the first halving divides by four, so that the deep
features have the size of training; the last doubling but one makes up for it. Modified shifted window attention (section 3.3):
at the full size, positions attend within a quarter of the image, whose place is drawn anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, check_unet, noting_size


@dataclass(frozen=True)
class HiDiffusion(Patch):
    """Draw at twice the side of training, in less time: smaller deep features and windowed attention.

    share: of the steps that have smaller deep features, 0 to 1 (the paper's .4 for twice the side). windows: attend within
    windows at the full size. For U-Nets that attend there, as Stable Diffusion 1 and 2 do.
    """

    share: float = 0.4
    windows: bool = True
    neutral: ClassVar[Mapping[str, Any]] = {"share": 0.0, "windows": False}

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError(f"hidiffusion: share takes 0 to 1, got {self.share}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Changes around the first halving, the doubling that answers it, and the outermost self-attentions."""
        net: Any = network
        check_unet(net, "hidiffusion")
        last, up = round(self.share * run.steps), len(net.up_blocks) - 2
        down, again = "down_blocks.0.downsamplers.0.conv", f"up_blocks.{up}.upsamplers.0"
        if {down, again} - dict(network.named_modules()).keys():
            raise UsageError(f"hidiffusion: this network has no {down} or no {again}")
        conv = net.get_submodule(down)

        def early() -> bool:
            return run.index(ROWS.get().level) < last

        def smaller(call: Callable[..., Any], x: Tensor) -> Tensor:
            return F.conv2d(x, conv.weight, conv.bias, 4, 2, 2) if early() else call(x)

        def larger(call: Callable[..., Any], x: Tensor, size: Any = None, *rest: Any, **given: Any) -> Tensor:
            if size is None and early():
                size = (4 * x.shape[2], 4 * x.shape[3])
            return call(x, size, *rest, **given)

        return {down: smaller, again: larger} | (self._windowed(network, run) if self.windows else {})

    def _windowed(self, network: Any, run: Run) -> dict[str, Change]:
        outer = ("down_blocks.0.", f"up_blocks.{len(network.up_blocks) - 1}.")
        names = [n for n, _ in network.named_modules() if n.startswith(outer) and n.endswith("attn1")]
        size: list[int] = []

        def windowed(place: int) -> Change:
            def change(call: Callable[..., Any], x: Tensor, *args: Any, **given: Any) -> Any:
                height, width = size
                if height % 2 or width % 2 or x.shape[1] != height * width:
                    return call(x, *args, **given)
                key = run.index(ROWS.get().level) * len(names) + place
                quarter = int(np.random.Generator(np.random.Philox(key=key)).integers(4))
                parts = windows(x, height, width, quarter)
                return joined([call(part, *args, **given) for part in parts], height, width, quarter)

            return change

        return {"": noting_size(size)} | {name: windowed(k) for k, name in enumerate(names)}


def windows(x: Tensor, height: int, width: int, quarter: int) -> list[Tensor]:
    """[B,H*W,C] -> four of [B,H*W/4,C], each a quarter of the image moved by `quarter` quarters of a window (0 to 3)."""
    image = x.reshape(len(x), height, width, -1).roll(_shift(height, width, quarter, -1), (1, 2))
    return [part.flatten(1, 2) for row in image.chunk(2, 1) for part in row.chunk(2, 2)]


def joined(parts: list[Tensor], height: int, width: int, quarter: int) -> Tensor:
    """What `windows` took apart."""
    squares = [part.reshape(len(part), height // 2, width // 2, -1) for part in parts]
    image = torch.cat([torch.cat(squares[:2], 2), torch.cat(squares[2:], 2)], 1)
    return image.roll(_shift(height, width, quarter, 1), (1, 2)).flatten(1, 2)


def _shift(height: int, width: int, quarter: int, sign: int) -> tuple[int, int]:
    return sign * (height // 2 * quarter // 4), sign * (width // 2 * quarter // 4)
