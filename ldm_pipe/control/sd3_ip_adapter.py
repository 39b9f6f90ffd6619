"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721) for Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206), as
InstantX publish it: in every block the image's own queries also look at its keys and at the tokens of a picture, which depend
on the time, and what they find joins what the attention gives, before its last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ldm_pipe.attention import split
from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError, check_interval
from ldm_pipe.level import inside
from ldm_pipe.patch import Change, Patch, Run
from ldm_pipe.vision import ImageTower

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class SD3IPAdapter(Patch):
    """Attend to the tokens of a picture in the blocks of Stable Diffusion 3, and add what is found, times a scale.

    adapter: a `networks.timed_prompt.TimedAdapter`. states: [1,L,E] of the picture (`of` makes them); the unconditional branch
    is shown zeros. It acts while the noise u is in lo <= u < hi (hi = 1 includes u = 1). Several add up.
    """

    adapter: Any
    states: Tensor
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("sd3_ip_adapter", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Any, tower: ImageTower, pictures: Sequence[Image], **fields: Any) -> SD3IPAdapter:
        """From the image encoder that the adapter was trained with (SigLIP), and a picture."""
        states = tower.states(tower.pixels(pictures))
        wanted = adapter.projection.proj_in.in_features
        if states.shape[-1] != wanted:
            raise UsageError(
                f"the IP-Adapter reads pictures by vectors of {wanted}, this image encoder gives {states.shape[-1]}"
            )
        return cls(adapter, states, **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """Changes around the transformer, its attentions and their last layers. Raises UsageError where it is another."""
        transformer: Any = getattr(network, "transformer", None)
        if not hasattr(transformer, "context_embedder") or hasattr(transformer, "single_transformer_blocks"):
            raise UsageError(f"sd3_ip_adapter needs the transformer of Stable Diffusion 3; {type(network).__name__} has none")
        blocks = range(len(transformer.transformer_blocks))
        names = [f"transformer_blocks.{i}.{n}" for i in blocks for n in ("attn", "attn2")]
        sites = {n: m for n in names if (m := _module(transformer, n)) is not None}
        sizes = {(b.to_k_ip.out_features, b.norm_q.weight.shape[0]) for b in self.adapter.beside}
        own = {(m.to_q.out_features, m.to_q.out_features // m.heads) for m in sites.values()}
        if len(sites) != len(self.adapter.beside) or sizes != own:
            size = f"{len(self.adapter.beside)} attentions of width {max(sizes, default=(0,))[0]}"
            raise UsageError(f"sd3_ip_adapter: the file is for {size}; it was made for another base model")
        seen = _Seen(self)
        made: dict[str, Change] = {"transformer": seen.at_time}
        for (name, module), beside in zip(sites.items(), self.adapter.beside, strict=True):
            each = _Each(seen, module, beside)
            made |= {f"transformer.{name}": each.ask, f"transformer.{name}.to_out.0": each.add}
        return made


def _module(transformer: Any, name: str) -> Any:
    block, _, leaf = name.rpartition(".")
    return getattr(transformer.get_submodule(block), leaf, None)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of one run: the tokens of this call's rows and time, and the time as the attentions are told it; empty when it is off."""

    patch: SD3IPAdapter
    now: list[Tensor] = field(default_factory=list)

    def at_time(self, call: Callable[..., Any], **given: Any) -> Any:
        """Makes the tokens first."""
        if self.patch.scale == 0 or not inside(ROWS.get().level, self.patch.lo, self.patch.hi):
            return call(**given)
        x, part = given["hidden_states"], ROWS.get().of("uncond")
        for module in (self.patch.adapter.projection, *self.patch.adapter.beside):
            module.to(x.device, x.dtype)
        states = self.patch.states.to(x)
        both, told = self.patch.adapter.projection(torch.cat([states, 0 * states]), given["timestep"].reshape(-1)[:1])
        without = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if part is not None:
            without[part] = 1
        self.now[:] = [both[without], told]
        try:
            return call(**given)
        finally:
            self.now.clear()


@dataclass(frozen=True, eq=False)
class _Each:
    """Of one attention and run. found: what its last layer is given besides."""

    seen: _Seen
    attn: Any
    beside: Any
    found: list[Tensor] = field(default_factory=list)

    def ask(self, call: Callable[..., Any], hidden_states: Tensor, *args: Any, **given: Any) -> Any:
        """Finds what there is in the tokens."""
        if self.seen.now:
            a = self.attn
            inputs = tuple(split(layer(hidden_states), a.heads) for layer in (a.to_q, a.to_k, a.to_v))
            self.found[:] = [self.seen.patch.scale * self.beside(inputs, *self.seen.now)]
        return call(hidden_states, *args, **given)

    def add(self, call: Callable[..., Any], x: Tensor) -> Any:
        """Adds it."""
        return call(x + self.found.pop() if self.found else x)
