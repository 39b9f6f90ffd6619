"""Adding Conditional Control to Text-to-Image Diffusion Models, Zhang et al. 2023, arXiv 2302.05543, section 3.2-3.4.

A second network reads x, the tokens and a picture, and what it gives joins every skip and the middle of the U-Net. Guess mode
(section 3.4 and appendix) leaves the unconditional branch alone and weakens the shallow layers. A union network was trained on
several kinds of pictures and is told which one it is (ControlNet++, xinsir 2024, https://github.com/xinsir6/ControlNetPlus).
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
from ldm_pipe.patch import Change, Patch, Run, changed, check_unet
from ldm_pipe.reuse import Reuse

Residuals = tuple[tuple[Tensor, ...], Tensor]
# The number of each kind of picture, as the published union networks of Stable Diffusion XL have them.
KINDS = {
    "pose": 0, "depth": 1, "hed": 2, "scribble": 2, "canny": 3, "lineart": 3, "mlsd": 3, "normal": 4, "segment": 5, "tile": 6,
    "repaint": 7,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ControlNet(Patch):
    """Add what a ControlNet makes of a picture to the U-Net's skips and middle.

    network: a ControlNetModel or ControlNetUnionModel of diffusers, for a U-Net of its shape. kind: of picture, one of `KINDS`,
    which a union network is told. hint: the picture [1,C,H,W] in 0..1, of the size of the
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
    kind: str = ""
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("controlnet", self.lo, self.hi)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the network, which is given the residuals."""
        check_unet(network, "controlnet")
        self._check_kind()
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

    def _check_kind(self) -> None:
        """Raise UsageError where the kind of picture is not one that the network was trained on."""
        count = getattr(self.network.config, "num_control_type", 0)
        known = [word for word, number in KINDS.items() if number < count]
        if self.kind not in (known or [""]):
            raise UsageError("controlnet: this network takes " + (f"a mode: {', '.join(known)}" if known else "no mode"))

    def _told(self, hint: Tensor) -> dict[str, Any]:
        """The picture [B,3,H,W] as the network is given it: a union's stands in a list beside its kind, marked in a row."""
        if not self.kind:
            return {"controlnet_cond": hint}
        marks = hint.new_zeros(len(hint), self.network.config.num_control_type)
        marks[:, KINDS[self.kind]] = 1
        return {"controlnet_cond": [hint], "control_type": marks, "control_type_idx": [KINDS[self.kind]]}

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
            inside, time.expand(len(x))[part], conditioning_scale=float(self.scale), guess_mode=self.guess, return_dict=False,
            **self._told(hint), **taken,
        )  # fmt: skip
        if left is None:
            return tuple(down), mid
        return tuple(_spread(t, rows) for t in down), _spread(mid, rows)


def _spread(t: Tensor, rows: Tensor) -> Tensor:
    out = t.new_zeros(len(rows), *t.shape[1:])
    out[rows] = t
    return out
