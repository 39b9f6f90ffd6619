"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721, eq. 5) for Flux, as XLabs publish it: in every block over image and text
together the image's own queries, without their places, also find the tokens of a picture, and what they find joins what the
block gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import split
from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError, check_interval
from ldm_pipe.level import inside
from ldm_pipe.patch import Change, Patch, Run
from ldm_pipe.vision import ImageTower

if TYPE_CHECKING:
    from PIL.Image import Image

Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # weight [C,D] and bias [C] of the keys, then of the values


@dataclass(frozen=True, eq=False)
class FluxIPAdapter(Patch):
    """Attend to the tokens of a picture in the blocks of Flux over image and text, and add what is found, times a scale.

    tokens: [1,M,D] of the picture; absent: [1,M,D] of a black one, for the unconditional branch (`of` makes both). weights: of
    every such block. It acts while the noise u is in lo <= u < hi (hi = 1 includes u = 1). Several add up.
    """

    tokens: Tensor
    absent: Tensor
    weights: tuple[Layer, ...]
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("flux_ip_adapter", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Any, tower: ImageTower, pictures: Sequence[Image], **fields: Any) -> FluxIPAdapter:
        """From a `networks.image_prompt.ImageAdapter` of Flux, the CLIP that it was trained with, and pictures, whose tokens
        stand side by side."""
        from PIL import Image as Pictures

        black = [Pictures.new("RGB", picture.size) for picture in pictures]
        tokens, absent = (adapter(tower.embeds(tower.pixels(p))).flatten(0, 1)[None] for p in (pictures, black))
        return cls(tokens, absent, adapter.weights, **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Changes around the blocks and their attention. Raises UsageError where the network is another."""
        transformer: Any = getattr(network, "transformer", None)
        if not hasattr(transformer, "single_transformer_blocks"):
            raise UsageError(f"flux_ip_adapter needs the transformer of Flux; {type(network).__name__} has none")
        blocks = list(transformer.transformer_blocks)
        inner = {w.shape[0] for w, *_ in self.weights}
        if len(blocks) != len(self.weights) or inner != {blocks[0].attn.to_q.out_features}:
            sizes = f"{len(self.weights)} blocks of width {max(inner, default=0)}"
            raise UsageError(f"flux_ip_adapter: the file is for {sizes}; it was made for another base model")
        made: dict[str, Change] = {}
        for i, (block, weights) in enumerate(zip(blocks, self.weights, strict=True)):
            beside = _Beside(self, block.attn, weights)
            made |= {f"transformer.transformer_blocks.{i}.attn": beside.ask, f"transformer.transformer_blocks.{i}": beside.add}
        return made


@dataclass(frozen=True, eq=False)
class _Beside:
    """Of one block and run. kept: keys and values of the picture and of none; now: the queries of this call."""

    patch: FluxIPAdapter
    attn: Any
    weights: Layer
    kept: list[Tensor] = field(default_factory=list)
    now: list[Tensor] = field(default_factory=list)

    @property
    def _acts(self) -> bool:
        return self.patch.scale != 0 and inside(ROWS.get().level, self.patch.lo, self.patch.hi)

    def ask(self, call: Callable[..., Any], hidden_states: Tensor, **given: Any) -> Any:
        """Notes the queries."""
        if self._acts:
            q = self.attn.to_q(hidden_states).unflatten(-1, (self.attn.heads, -1))
            self.now[:] = [self.attn.norm_q(q).transpose(1, 2)]
        return call(hidden_states=hidden_states, **given)

    def add(self, call: Callable[..., Any], **given: Any) -> Any:
        """Adds what they find."""
        text, image = call(**given)
        if not self._acts:
            return text, image
        q = self.now.pop()
        if not self.kept:
            both = torch.cat([self.patch.tokens, self.patch.absent]).to(q)
            wk, bk, wv, bv = (w.to(q) for w in self.weights)
            self.kept[:] = [split(F.linear(both, w, b), q.shape[1]) for w, b in ((wk, bk), (wv, bv))]
        without = torch.zeros(len(q), dtype=torch.long, device=q.device)
        part = ROWS.get().of("uncond")
        if part is not None:
            without[part] = 1
        k, v = (t[without] for t in self.kept)
        return text, image + self.patch.scale * F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
