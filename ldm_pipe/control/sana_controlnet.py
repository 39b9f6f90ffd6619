"""ControlNet (Zhang et al. 2023, arXiv 2302.05543, section 3) for Sana (Xie et al. 2024, arXiv 2410.10629): a copy of the first
blocks reads x and the latents of a picture, and what each of them gives joins the tokens behind the next block of the network.
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
from ldm_pipe.patch import Change, Patch, Run
from ldm_pipe.residuals import added

NAME = "controlnet_block_samples"


@dataclass(frozen=True, eq=False)
class SanaControlNet(Patch):
    """Add what a ControlNet of Sana makes of a picture behind the blocks of the transformer.

    network: a SanaControlNetModel of diffusers. hint: the picture's latents [1,C,h,w] (`of` makes them). It acts while the
    noise u is in lo <= u < hi (hi = 1 includes u = 1). Several of one depth add up.
    """

    network: Any
    hint: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("sana_controlnet", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, network: Any, codec: Any, picture: Tensor, **fields: Any) -> SanaControlNet:
        """picture: [1,3,H,W] in -1..1, of the size of the image."""
        return cls(network, codec.encode(picture), **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the transformer, which is given the blocks. Raises UsageError where it is another."""
        transformer: Any = getattr(network, "transformer", None)
        if not hasattr(transformer, "caption_norm"):
            raise UsageError(f"sana_controlnet needs the transformer of Sana; {type(network).__name__} has none")

        def controlled(call: Callable[..., Any], x: Tensor, **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(x, **given)
            hint, before = self.hint.to(x).expand(len(x), -1, -1, -1), given.pop(NAME, None)
            blocks = self.network(x, controlnet_cond=hint, conditioning_scale=self.scale, **given)[0]
            return call(x, **given, **{NAME: added("sana_controlnet", blocks, before)})

        return {"transformer": controlled}
