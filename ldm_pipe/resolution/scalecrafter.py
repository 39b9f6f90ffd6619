"""ScaleCrafter: Tuning-free Higher-Resolution Visual Generation with Diffusion Models, He et al. 2023, arXiv 2310.07702.

Re-dilation (section 3.2, eq. 2-3): at the first steps, which settle what is where, the convolutions look as far in the larger
image as they looked in training. A dilation that is no whole number d: the features are enlarged by ceil(d) / d, convolved with
dilation ceil(d) and brought back. (Its guidance is the rule `noise_damped`.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, check_unet, matching


@dataclass(frozen=True)
class ScaleCrafter(Patch):
    """Dilate the inner convolutions in the first steps.

    dilation: 1 = none, 2 for twice the side of training. share: of the steps, 0 to 1. layers: stages by name with spaces
    between, "" = all but the outermost, which is the paper's choice for Stable Diffusion at twice its side.
    """

    dilation: float = 2.0
    share: float = 0.6
    layers: str = ""
    neutral: ClassVar[Mapping[str, Any]] = {"dilation": 1.0}

    def __post_init__(self) -> None:
        if not (1 <= self.dilation <= 8 and 0 <= self.share <= 1):
            raise UsageError(f"scalecrafter: dilation takes 1 to 8 and share 0 to 1, got {self.dilation} and {self.share}")

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
        last = round(self.share * run.steps)

        def dilated(module: nn.Conv2d) -> Change:
            def change(call: Callable[..., Any], x: Tensor) -> Tensor:
                if self.dilation == 1 or run.index(ROWS.get().level) >= last:
                    return call(x)
                return redilated(x, module, self.dilation)

            return change

        return {name: dilated(module) for name, module in convolutions.items()}


def redilated(x: Tensor, conv: nn.Conv2d, dilation: float) -> Tensor:
    """A 3x3 convolution of x [B,C,H,W] with a dilation that need not be whole -> [B,C',H/stride,W/stride]."""
    whole, size = math.ceil(dilation), [-(-side // conv.stride[0]) for side in x.shape[2:]]
    if whole != dilation:
        x = F.interpolate(x, scale_factor=whole / dilation, mode="bilinear")
    out = F.conv2d(x, conv.weight, conv.bias, conv.stride, whole, whole)
    return out if list(out.shape[2:]) == size else F.interpolate(out, size=size, mode="bilinear")


def _inner(network: Any) -> list[str]:
    check_unet(network, "scalecrafter without names of layers")
    down = [f"down_blocks.{i}" for i in range(1, len(network.down_blocks))]
    return [*down, "mid_block", *(f"up_blocks.{i}" for i in range(len(network.up_blocks) - 1))]
