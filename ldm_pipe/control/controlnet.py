"""Adding Conditional Control to Text-to-Image Diffusion Models, Zhang et al. 2023, arXiv 2302.05543, section 3.2-3.4.

A second network reads x, the tokens and a picture, and what it gives joins every skip and the middle of the U-Net. Guess mode
(section 3.4 and appendix) leaves the unconditional branch alone and weakens the shallow layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_pipe.cond import ROWS
from ldm_pipe.errors import check_interval
from ldm_pipe.level import inside
from ldm_pipe.patch import Change, Patch, Run, changed, check_unet
from ldm_pipe.reuse import Reuse

Residuals = tuple[tuple[Tensor, ...], Tensor]


@dataclass(frozen=True, eq=False)
class ControlNet(Patch):
    """Add what a ControlNet makes of a picture to the U-Net's skips and middle.

    network: a ControlNetModel of diffusers, for a U-Net of its shape. hint: the picture [1,C,H,W] in 0..1, of the size of the
    image. It acts while the noise u is in lo <= u < hi (hi = 1 includes u = 1). guess: without the prompt's help. keys: the
    steps at which it is computed, its last residuals in between (encoder propagation needs it at its own key steps alone);
    None is all. Several add up.
    """

    network: Any
    hint: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    guess: bool = False
    keys: tuple[int, ...] | None = None
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("controlnet", self.lo, self.hi)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the network, which is given the residuals."""
        check_unet(network, "controlnet")
        keep = Reuse(run.index, tuple(range(run.steps)) if self.keys is None else self.keys).changes(["control"])["control"]
        picture: list[Tensor] = []

        def read(call: Callable[..., Any], hint: Tensor) -> Tensor:
            """The picture's features, once a run."""
            if not picture:
                picture.append(call(hint[:1]))
            return picture[0].expand(len(hint), -1, -1, -1)

        def controlled(call: Callable[..., Any], x: Tensor, time: Tensor, **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(x, time, **given)
            with changed(self.network, {"controlnet_cond_embedding": [read]}):
                down, mid = keep(self._residuals, x, time, given)
            before, middle = given.get("down_block_additional_residuals"), given.get("mid_block_additional_residual")
            given["down_block_additional_residuals"] = [a + b for a, b in zip(down, before, strict=True)] if before else down
            given["mid_block_additional_residual"] = mid if middle is None else mid + middle
            return call(x, time, **given)

        return {"": controlled}

    def _residuals(self, x: Tensor, time: Tensor, given: Mapping[str, Any]) -> Residuals:
        """Of every row of x; in guess mode zeros for the unconditional branch."""
        names = ("encoder_hidden_states", "timestep_cond", "added_cond_kwargs")
        taken = {n: given[n] for n in names if given.get(n) is not None}
        left = ROWS.get().of("uncond") if self.guess else None
        rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if left is not None:
            rows[left] = False
        part = slice(None) if left is None else rows
        taken = {n: {k: t[part] for k, t in v.items()} if isinstance(v, Mapping) else v[part] for n, v in taken.items()}
        channels = self.network.config.in_channels
        inside = x[part, :channels]
        hint = self.hint.to(x).expand(len(inside), -1, -1, -1)
        down, mid = self.network(
            inside, time.expand(len(x))[part], controlnet_cond=hint, conditioning_scale=self.scale, guess_mode=self.guess,
            return_dict=False, **taken,
        )  # fmt: skip
        if left is None:
            return tuple(down), mid
        return tuple(_spread(t, rows) for t in down), _spread(mid, rows)


def _spread(t: Tensor, rows: Tensor) -> Tensor:
    out = t.new_zeros(len(rows), *t.shape[1:])
    out[rows] = t
    return out
