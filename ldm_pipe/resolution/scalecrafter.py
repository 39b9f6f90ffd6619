"""ScaleCrafter: Tuning-free Higher-Resolution Visual Generation with Diffusion Models, He et al. 2023, arXiv 2310.07702.

Re-dilation (section 3.2, eq. 2-3): at the first steps, which settle what is where, the convolutions look as far in the larger
image as they looked in training. A dilation that is no whole number d: the features are enlarged by ceil(d) / d, convolved with
dilation ceil(d) and brought back. Dispersion (section 3.3, eq. 4-6) makes 5x5 kernels of 3x3 ones that look twice as far, so
that half the dilation does; the paper's settings leave it off. (Its guidance is the rule `noise_damped`.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, check_unet, matching


@dataclass(frozen=True)
class ScaleCrafter(Patch):
    """Dilate the inner convolutions in the first steps.

    dilation: 1 = none, 2 for twice the side of training. share: of the steps, 0 to 1. layers: stages by name with spaces
    between, "" = all but the outermost, which is the paper's choice for Stable Diffusion at twice its side. dispersed: share of
    the steps, the first ones of those, with 5x5 kernels and half the dilation, which is then to be 2 or more.
    """

    dilation: float = 2.0
    share: float = 0.6
    layers: str = ""
    dispersed: float = 0.0
    neutral: ClassVar[Mapping[str, Any]] = {"dilation": 1.0}

    def __post_init__(self) -> None:
        if not (1 <= self.dilation <= 8 and 0 <= self.share <= 1):
            raise UsageError(f"scalecrafter: dilation takes 1 to 8 and share 0 to 1, got {self.dilation} and {self.share}")
        if not 0 <= self.dispersed <= self.share or (self.dispersed and self.dilation < 2):
            given = f"got {self.dispersed}, {self.share} and {self.dilation}"
            raise UsageError(f"scalecrafter: dispersed takes 0 to share, and a dilation from 2, {given}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around every 3x3 convolution of the stages."""
        stages = matching(network, self.layers.split()) or _inner(network)
        convolutions = {
            f"{stage}.{name}": module
            for stage in stages
            for name, module in network.get_submodule(stage).named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
        }
        if not convolutions:
            raise UsageError(f"scalecrafter: no 3x3 convolution in {', '.join(stages)}")
        last, wide = (round(share * run.steps) for share in (self.share, self.dispersed))

        def dilated(module: nn.Conv2d) -> Change:
            def change(call: Callable[..., Any], x: Tensor) -> Tensor:
                step = run.index(ROWS.get().level)
                if self.dilation == 1 or step >= last:
                    return call(x)
                return redilated(x, module, self.dilation / (2 if step < wide else 1), step < wide)

            return change

        return {name: dilated(module) for name, module in convolutions.items()}


def redilated(x: Tensor, conv: nn.Conv2d, dilation: float, disperse: bool = False) -> Tensor:
    """A 3x3 convolution of x [B,C,H,W] with a dilation that need not be whole -> [B,C',H/stride,W/stride]. disperse: by the
    5x5 kernels, made for this call and not kept."""
    whole, size = math.ceil(dilation), [-(-side // conv.stride[0]) for side in x.shape[2:]]
    if whole != dilation:
        x = F.interpolate(x, scale_factor=whole / dilation, mode="bilinear")
    weight = dispersed(conv.weight) if disperse else conv.weight
    out = F.conv2d(x, weight, conv.bias, conv.stride, whole * (weight.shape[-1] // 2), whole)
    return out if list(out.shape[2:]) == size else F.interpolate(out, size=size, mode="bilinear")


def dispersed(weight: Tensor) -> Tensor:
    """Kernels [C',C,3,3] -> [C',C,5,5] that do to an image of twice the size what those do to the image."""
    return (weight.flatten(2) @ dispersion().to(weight).mT).reshape(*weight.shape[:2], 5, 5)


@functools.cache
def dispersion() -> Tensor:
    """R [25,9], float64: the kernels R k for which up(x) * R k is nearest to up(x * k), and x * R k, with a weight of .05, to
    x * k, over all k and all x of 7x7 pixels, zeros around them; up: bilinear, to twice the size (eq. 6)."""
    x = torch.eye(49, dtype=torch.float64).reshape(-1, 1, 7, 7)
    three, five = (torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n) for n in (3, 5))
    large, small = F.interpolate(x, scale_factor=2, mode="bilinear"), F.conv2d(x, three, padding=1)
    wanted = [F.interpolate(small, scale_factor=2, mode="bilinear"), 0.05 * small]
    given = [F.conv2d(large, five, padding=2), 0.05 * F.conv2d(x, five, padding=2)]
    rows = [torch.cat([t.movedim(1, -1).flatten(0, -2) for t in side]) for side in (given, wanted)]
    return torch.linalg.lstsq(*rows).solution


def _inner(network: Any) -> list[str]:
    check_unet(network, "scalecrafter without names of layers")
    down = [f"down_blocks.{i}" for i in range(1, len(network.down_blocks))]
    return [*down, "mid_block", *(f"up_blocks.{i}" for i in range(len(network.up_blocks) - 1))]
