"""IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, Ye et al. 2023, arXiv 2308.06721, eq. 5.

A picture as a prompt: its tokens have keys and values of their own in every attention to the text, and what the same queries
find there is added to what they find in the text. Files for faces also add a low rank to the layers of every attention (LoRA:
Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv 2106.09685, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import Site, attention_rule, grid, sites_of, split
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.errors import UsageError, check_interval
from ldm_pipe.level import inside
from ldm_pipe.patch import Change, Patch, Run, changed, check_unet
from ldm_pipe.vision import ImageTower

if TYPE_CHECKING:
    from PIL.Image import Image

ORDER = ("down_blocks", "up_blocks", "mid_block")  # of the layers in the published files
WITHOUT = ("uncond", "image")  # branches under the negative prompt, which are shown no picture


@dataclass(frozen=True, eq=False)
class IPAdapter(Patch):
    """Attend to the tokens of a picture beside those of the text, and add what is found, times a scale.

    tokens: [1,M,D] of the picture; absent: [1,M,D] of none, for the unconditional branch (`of` makes both). weights: (keys,
    values), [C,D] each, of every attention to the text: down, up, middle. mask: [1,1,H,W] of the size of the image, by which
    what is found is multiplied. low: (down, up) by layer, of every attention in that order, added to it. It acts while the
    noise u is in lo <= u < hi (hi = 1 includes u = 1). Several add up.
    """

    tokens: Tensor
    absent: Tensor
    weights: tuple[tuple[Tensor, Tensor], ...]
    scale: float = 1.0
    lo: float = 0.0
    hi: float = 1.0
    mask: Tensor | None = None
    low: tuple[Mapping[str, tuple[Tensor, Tensor]], ...] = ()
    neutral: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def __post_init__(self) -> None:
        check_interval("ip_adapter", self.lo, self.hi)

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: Any, tower: ImageTower, pictures: Sequence[Image], **fields: Any) -> IPAdapter:
        """From a `networks.image_prompt.ImageAdapter`, the CLIP that it was trained with, and pictures, whose tokens stand side
        by side. No picture is CLIP's view of the mean colour, or a vector of zeros."""
        pixels = tower.pixels(pictures)
        if adapter.deep:
            seen, none = tower.states(pixels), tower.states(torch.zeros_like(pixels))
        else:
            seen = tower.embeds(pixels)
            none = torch.zeros_like(seen)
        tokens, absent = (adapter(t).flatten(0, 1)[None] for t in (seen, none))
        return cls(tokens, absent, adapter.weights, **fields)

    @classmethod
    @torch.no_grad()
    def of_faces(cls, adapter: Any, vectors: Tensor, **fields: Any) -> IPAdapter:
        """From an adapter for faces and a recogniser's vectors [N,E], whose tokens stand side by side. No face is zeros."""
        tokens, absent = (adapter(t).flatten(0, 1)[None] for t in (vectors, torch.zeros_like(vectors)))
        return cls(tokens, absent, adapter.weights, low=adapter.low, **fields)

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change around the network, under which its attentions to the text see the picture too."""
        check_unet(network, "ip_adapter")
        every = sorted(sites_of(network), key=lambda n: ORDER.index(n.partition(".")[0]))
        names = [n for n in every if n.endswith("attn2")]
        self._check(network, names)
        found, lower = {n: network.get_submodule(n) for n in names}, self._lower(network, every)
        rule = _Beside(self, dict(zip(names, self.weights, strict=True)))

        def prompted(call: Callable[..., Any], *args: Any, **given: Any) -> Any:
            if self.scale == 0 or not inside(ROWS.get().level, self.lo, self.hi):
                return call(*args, **given)
            with attention_rule(network, rule, found), changed(network, lower):
                return call(*args, **given)

        return {"": prompted}

    def _check(self, network: nn.Module, names: Sequence[str]) -> None:
        if len(names) != len(self.weights):
            count = f"the file is for {len(self.weights)} attentions to the text, this network has {len(names)}"
            raise UsageError(f"ip_adapter: {count}; it was made for another base model")
        for name, (keys, _) in zip(names, self.weights, strict=True):
            own: Any = network.get_submodule(name).to_k
            if keys.shape != (own.out_features, self.tokens.shape[-1]) or keys.shape[1] != own.in_features:
                sizes = f"{list(keys.shape)}, and {name}.to_k has {[own.out_features, own.in_features]}"
                raise UsageError(f"ip_adapter: its keys there are {sizes}; it was made for another base model")

    def _lower(self, network: nn.Module, names: Sequence[str]) -> dict[str, list[Change]]:
        """The changes that add the low ranks, by the name of the layer."""
        made: dict[str, list[Change]] = {}
        for site, row in zip(names, self.low, strict=False):
            for layer, (down, up) in row.items():
                name = f"{site}.{layer}" + (".0" if layer == "to_out" else "")
                own: Any = network.get_submodule(name)
                if (up.shape[0], down.shape[1]) != (own.out_features, own.in_features):
                    sizes = f"{[up.shape[0], down.shape[1]]}, and {name} has {[own.out_features, own.in_features]}"
                    raise UsageError(f"ip_adapter: what it adds there is {sizes}; it was made for another base model")
                made[name] = [_added(down, up)]
        return made


def _added(down: Tensor, up: Tensor) -> Change:
    def added(call: Callable[..., Any], x: Tensor) -> Any:
        return call(x) + F.linear(F.linear(x, down.to(x)), up.to(x))

    return added


@dataclass(frozen=True, eq=False)
class _Beside:
    """The attention rule of one run; keys and values are computed once, for the picture and for none, the mask once a size."""

    patch: IPAdapter
    weights: Mapping[str, tuple[Tensor, Tensor]]
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if site.name not in self.kept:
            both = torch.cat([self.patch.tokens, self.patch.absent]).to(q)
            keys, values = (split(F.linear(both, w.to(q)), q.shape[1]) for w in self.weights[site.name])
            self.kept[site.name] = keys, values
        rows = _without(site.rows, len(q), q.device)
        keys, values = (t[rows] for t in self.kept[site.name])
        found = self.patch.scale * F.scaled_dot_product_attention(q, keys, values)
        return out + (found if self.patch.mask is None else found * self._mask(self.patch.mask, q))

    def _mask(self, mask: Tensor, q: Tensor) -> Tensor:
        """[1,1,L,1] over the positions of the queries, as diffusers' IPAdapterMaskProcessor makes it smaller."""
        count = q.shape[2]
        if count not in self.masks:
            size = grid(count, mask.shape[-2], mask.shape[-1])
            self.masks[count] = F.interpolate(mask.float(), size=size, mode="bicubic").reshape(1, 1, count, 1).to(q)
        return self.masks[count]


def _without(rows: Rows, count: int, device: torch.device) -> Tensor:
    """[B]: 1 for the rows that are shown no picture."""
    found = torch.zeros(count, dtype=torch.long, device=device)
    for branch in WITHOUT:
        part = rows.of(branch)
        if part is not None:
            found[part] = 1
    return found
