"""ControlNet (Zhang et al. 2023, arXiv 2302.05543, section 3) for Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv
2403.03206): a copy of the first blocks reads x and the latents of a picture, and what it gives joins the image's tokens behind
the blocks of the network, each of its blocks serving several in a row where it has fewer.
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

NAME = "block_controlnet_hidden_states"


@dataclass(frozen=True, eq=False)
class SD3ControlNet(Patch):
    """Add what a ControlNet of Stable Diffusion 3 makes of a picture behind the blocks of the transformer.

    network: an SD3ControlNetModel of diffusers. hint: latents [1,C,h,w] of the picture (`of` says how they are scaled). It acts
    while the noise u is in lo <= u < hi (hi = 1 includes u = 1). Several of one depth add up.
    """

    network: Any
    hint: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("sd3_controlnet", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, network: Any, codec: Any, picture: Tensor, **fields: Any) -> SD3ControlNet:
        """picture: [1,3,H,W] in -1..1, of the size of the image. Networks trained without the pooled prompt (InstantX) were
        trained on latents that are scaled and not shifted."""
        latents = codec.encode(picture)
        if network.config.force_zeros_for_pooled_projection:
            latents = codec.raw(latents) * codec.vae.config.scaling_factor
        return cls(network, latents, **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the transformer, which is given the blocks. Raises UsageError where it is another."""
        transformer: Any = getattr(network, "transformer", None)
        if not hasattr(transformer, "context_embedder") or hasattr(transformer, "single_transformer_blocks"):
            raise UsageError(f"sd3_controlnet needs the transformer of Stable Diffusion 3; {type(network).__name__} has none")

        def controlled(call: Callable[..., Any], **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(**given)
            given[NAME] = added("sd3_controlnet", self._blocks(transformer, given), given.get(NAME))
            return call(**given)

        return {"transformer": controlled}

    def _blocks(self, transformer: Any, given: Mapping[str, Any]) -> list[Tensor]:
        x, pooled, config = given["hidden_states"], given["pooled_projections"], self.network.config
        found = self.network(
            hidden_states=x if config.use_pos_embed else transformer.pos_embed(x),
            timestep=given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"] if config.joint_attention_dim is not None else None,
            pooled_projections=torch.zeros_like(pooled) if config.force_zeros_for_pooled_projection else pooled,
            controlnet_cond=self.hint.to(x).expand(len(x), -1, -1, -1),
            conditioning_scale=self.scale,
            return_dict=False,
        )[0]
        return list(found)
