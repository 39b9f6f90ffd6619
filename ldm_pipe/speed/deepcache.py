"""DeepCache: Accelerating Diffusion Models for Free, Ma et al. 2023, arXiv 2312.00858, section 3.2, eq. 7-9.

Deep features change slowly from step to step. Every `interval`-th step runs the whole U-Net; at the others only the outermost
layers run, and the deep feature that enters the last of them is that of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ldm_pipe.errors import UsageError
from ldm_pipe.patch import Change, Patch, Run, check_unet
from ldm_pipe.reuse import Reuse


@dataclass(frozen=True)
class DeepCache(Patch):
    """Compute everything every `interval` steps, and the outermost layers alone in between.

    branch: how many of those layers on the way down (0: none but the first convolution; there is one more on the way up).
    """

    interval: int = 2
    branch: int = 0
    neutral: ClassVar[Mapping[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.interval < 1 or self.branch < 0:
            raise UsageError(f"deepcache takes an interval from 1 and a branch from 0, got {self.interval} and {self.branch}")

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Everything between the outermost layers answers from memory."""
        return Reuse(run.index, tuple(range(0, run.steps, self.interval))).changes(self._deep(network))

    def _deep(self, network: Any) -> list[str]:
        check_unet(network, "deepcache")
        first, last = network.down_blocks[0], len(network.up_blocks) - 1
        layers, ups = len(first.resnets), len(network.up_blocks[last].resnets)
        if self.branch > layers:
            raise UsageError(f"deepcache: branch is {self.branch}; this network's first block has {layers} layer(s)")
        found = [f"down_blocks.{i}" for i in range(1, len(network.down_blocks))] + ["mid_block"]
        found += [f"up_blocks.{i}" for i in range(last)]
        for name, count in (("resnets", layers), ("attentions", _count(first, "attentions"))):
            found += [f"down_blocks.0.{name}.{i}" for i in range(self.branch, count)]
        found += [f"down_blocks.0.downsamplers.{i}" for i in range(_count(first, "downsamplers"))]
        for name in ("resnets", "attentions"):
            count = _count(network.up_blocks[last], name)
            found += [f"up_blocks.{last}.{name}.{i}" for i in range(min(count, ups - 1 - self.branch))]
        return found


def _count(block: Any, name: str) -> int:
    return len(getattr(block, name, None) or ())
