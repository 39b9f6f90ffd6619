"""T2I-Adapter: Learning Adapters to Dig out More Controllable Ability, Mou et al. 2023, arXiv 2302.08453, section 3.3, eq. 1-3.

A small network reads a picture once, not at every step; its features join the U-Net's on the way down, one size a stage.
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
from ldm_pipe.patch import Change, Patch, Run, check_unet

NAME = "down_intrablock_additional_residuals"


@dataclass(frozen=True, eq=False)
class T2IAdapter(Patch):
    """Add an adapter's features of a picture to the U-Net's on the way down.

    features: one [1,C,h,w] for each stage (`of` makes them). It acts while the noise u is in lo <= u < hi (hi = 1 includes
    u = 1). Several add up.
    """

    features: tuple[Tensor, ...]
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("t2i_adapter", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Any, hint: Tensor, **fields: Any) -> T2IAdapter:
        """From a T2IAdapter of diffusers and a picture [1,C,H,W] in 0..1, of the size of the image."""
        return cls(tuple(adapter(hint)), **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the network, which is given the features."""
        check_unet(network, "t2i_adapter")
        stages = len(getattr(network, "down_blocks", ()))
        if len(self.features) > stages + 1:
            raise UsageError(f"t2i_adapter: the adapter has {len(self.features)} sizes, the network's way down {stages} stages")

        def adapted(call: Callable[..., Any], x: Tensor, time: Tensor, **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(x, time, **given)
            added = [(f.to(x) * self.scale).expand(len(x), -1, -1, -1) for f in self.features]
            if given.get(NAME) is not None:
                added = [a + b for a, b in zip(added, given[NAME], strict=True)]
            given[NAME] = added
            return call(x, time, **given)

        return {"": adapted}
