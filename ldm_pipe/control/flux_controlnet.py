"""ControlNet (Zhang et al. 2023, arXiv 2302.05543, section 3) for Flux: a few blocks of its kind read x and the latents of a
picture, and what they give joins the image's tokens behind the blocks of the network.

A union network was trained on several kinds of pictures and is told which one it is (ControlNet++, xinsir 2024).
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

NAMES = ("controlnet_block_samples", "controlnet_single_block_samples")
GIVEN = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids")


@dataclass(frozen=True, eq=False)
class FluxControlNet(Patch):
    """Add what a ControlNet of Flux makes of a picture behind the blocks of the transformer.

    network: a FluxControlNetModel of diffusers. hint: the picture's latents as tokens [1,L,4C] (`of` makes them). mode: which
    kind of picture it is, for a union network, from 0. It acts while the noise u is in lo <= u < hi (hi = 1 includes u = 1).
    Several of one depth add up.
    """

    network: Any
    hint: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    mode: int | None = None
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("flux_controlnet", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, network: Any, codec: Any, picture: Tensor, **fields: Any) -> FluxControlNet:
        """picture: [1,3,H,W] in -1..1, of the size of the image."""
        latents = codec.encode(picture)
        squares = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # [1,C,h/2,w/2,2,2]
        return cls(network, squares.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the transformer, which is given the blocks. Raises UsageError where it is another, or the network of
        another kind."""
        transformer: Any = getattr(network, "transformer", None)
        if not hasattr(transformer, "single_transformer_blocks"):
            raise UsageError(f"flux_controlnet needs the transformer of Flux; {type(network).__name__} has none")
        self._check(transformer)

        def controlled(call: Callable[..., Any], **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(**given)
            for name, blocks in zip(NAMES, self._blocks(given), strict=True):
                given[name] = added("flux_controlnet", blocks, given.get(name))
            return call(**given)

        return {"transformer": controlled}

    def _check(self, transformer: Any) -> None:
        config, kinds = self.network.config, self.network.config.num_mode
        if (self.mode is None) != (kinds is None) or not 0 <= (self.mode or 0) < (kinds or 1):
            wanted = f"a mode from 0 to {kinds - 1}" if kinds else "no mode"
            raise UsageError(f"flux_controlnet: this network takes {wanted}, got {self.mode}")
        if config.conditioning_embedding_channels is not None:
            raise UsageError("flux_controlnet: networks with a hint block of their own (XLabs) are not supported")
        if config.guidance_embeds and not transformer.config.guidance_embeds:
            raise UsageError("flux_controlnet: this network is told the guidance scale, which this model has not")

    def _blocks(self, given: Mapping[str, Any]) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Behind the blocks over image and text together, and behind the single ones."""
        x = given["hidden_states"]
        mode = None if self.mode is None else torch.full((len(x), 1), self.mode, device=x.device)
        both: tuple[list[Tensor] | None, list[Tensor] | None] = self.network(
            controlnet_cond=self.hint.to(x).expand(len(x), -1, -1),
            controlnet_mode=mode,
            conditioning_scale=self.scale,
            guidance=given["guidance"] if self.network.config.guidance_embeds else None,
            return_dict=False,
            **{n: given[n] for n in GIVEN},
        )
        return both
