"""HiDiffusion: Unlocking Higher-Resolution Creativity and Efficiency in Pretrained Diffusion Models, Zhang et al. 2023.

arXiv 2311.17528. Resolution-aware U-Net (section 3.2): in the first steps the deep features have the size of training, made so
in one stage, for four times the side in two. Networks that attend at the full size (Stable Diffusion 1 and 2) halve by four
there, and pool in the stage below; those that first attend below (SDXL) pool there, and halve by four behind it. Modified
shifted window attention (section 3.3): where a network first attends, positions do so within a quarter of the image, whose
place is drawn anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import grid
from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, check_unet, noting_size

Size = tuple[int, int]


@dataclass(frozen=True)
class HiDiffusion(Patch):
    """Draw at twice the side of training or more, in less time: smaller deep features and windowed attention.

    share: of the steps that have smaller deep features, 0 to 1: the paper's .4 for twice the side, .7 for four times, .5 for
    turbo models. windows: attend within windows. second: share of the steps with a second stage of the kind, .3 for four times
    the side. instead: while it lasts, the second is in the place of the first (at twice the side of SDXL, second .16 of it).
    """

    share: float = 0.4
    windows: bool = True
    second: float = 0.0
    instead: bool = False
    neutral: ClassVar[Mapping[str, Any]] = {"share": 0.0, "windows": False}

    def __post_init__(self) -> None:
        for name in ("share", "second"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"hidiffusion: {name} takes 0 to 1, got {getattr(self, name)}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Changes around two ways down, the ways up that answer them, and the outermost self-attentions."""
        net: Any = network
        check_unet(net, "hidiffusion")
        outer = next((k for k, stage in enumerate(net.down_blocks) if len(getattr(stage, "attentions", ()))), None)
        if outer is None:
            raise UsageError("hidiffusion: this network attends nowhere on its way down")
        first, second = round(self.share * run.steps), round(self.second * run.steps)

        def one() -> bool:
            return (second if self.instead else 0) <= run.index(ROWS.get().level) < first

        def two() -> bool:
            return run.index(ROWS.get().level) < second

        found: dict[str, Change] = {}
        if second:
            found |= _pooled(net, 1, two) | _halved(net, 1) if outer == 0 else _halved(net, outer, two)
        if first and outer == 0:
            found |= _halved(net, 0, one)
        elif first:
            found |= _pooled(net, outer, one) | (_halved(net, outer) if not second else {})
        return found | (self._windowed(net, outer, run) if self.windows else {})

    def _windowed(self, network: Any, outer: int, run: Run) -> dict[str, Change]:
        stages = (f"down_blocks.{outer}.", f"up_blocks.{len(network.up_blocks) - 1 - outer}.")
        names = [n for n, _ in network.named_modules() if n.startswith(stages) and n.endswith("attn1")]
        size: list[int] = []

        def windowed(place: int) -> Change:
            def change(call: Callable[..., Any], x: Tensor, *args: Any, **given: Any) -> Any:
                try:
                    height, width = grid(x.shape[1], *size)
                except UsageError:  # the size is that of an image of which this is a tile
                    height = width = 1
                if height % 2 or width % 2:
                    return call(x, *args, **given)
                key = run.index(ROWS.get().level) * len(names) + place
                quarter = int(np.random.Generator(np.random.Philox(key=key)).integers(4))
                parts = windows(x, height, width, quarter)
                return joined([call(part, *args, **given) for part in parts], height, width, quarter)

            return change

        return {"": noting_size(size)} | {name: windowed(k) for k, name in enumerate(names)}


def _halved(network: Any, stage: int, by_four: Callable[[], bool] = lambda: False) -> dict[str, Change]:
    """The halving behind a stage divides by four while it is so; the doubling that answers it gives back the size it had."""
    down, up = f"down_blocks.{stage}.downsamplers.0.conv", f"up_blocks.{len(network.up_blocks) - 2 - stage}.upsamplers.0"
    conv = _at(network, down, up)[0]
    was: list[Size] = []

    def smaller(call: Callable[..., Any], x: Tensor) -> Tensor:
        was[:] = [(x.shape[2], x.shape[3])]
        return F.conv2d(x, conv.weight, conv.bias, 4, 2, 2) if by_four() else call(x)

    def larger(call: Callable[..., Any], x: Tensor, size: Any = None, *rest: Any, **given: Any) -> Tensor:
        if size is None and was and was[0] != (2 * x.shape[2], 2 * x.shape[3]):
            size = was[0]
        return call(x, size, *rest, **given)

    return {down: smaller, up: larger}


def _pooled(network: Any, stage: int, active: Callable[[], bool]) -> dict[str, Change]:
    """Behind the first block of a stage the features are pooled while it is so; on the way up they get back the size they had,
    before the last block."""
    blocks = len(getattr(network.down_blocks[stage], "attentions", ())) or 1
    down, up = f"down_blocks.{stage}.attentions.0", f"up_blocks.{len(network.up_blocks) - 1 - stage}.attentions.{blocks - 1}"
    _at(network, down, up)
    was: list[Size] = []

    def pooled(call: Callable[..., Any], *args: Any, **given: Any) -> Any:
        out, wrap = _unwrapped(call(*args, **given))
        was[:] = [(out.shape[2], out.shape[3])] if active() else []
        return wrap(F.avg_pool2d(out, 2, ceil_mode=True) if was else out)

    def restored(call: Callable[..., Any], *args: Any, **given: Any) -> Any:
        out, wrap = _unwrapped(call(*args, **given))
        return wrap(F.interpolate(out, size=was[0], mode="bicubic") if was else out)

    return {down: pooled, up: restored}


def _unwrapped(out: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """A tensor, and how to give it back: alone, or as a network of diffusers does."""
    return (out, lambda t: t) if isinstance(out, Tensor) else (out[0], lambda t: (t,))


def _at(network: Any, *names: str) -> list[Any]:
    if set(names) - dict(network.named_modules()).keys():
        raise UsageError(f"hidiffusion: this network has no {' or no '.join(names)}")
    return [network.get_submodule(name) for name in names]


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
