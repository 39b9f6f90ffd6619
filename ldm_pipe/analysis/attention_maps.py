"""Where each token is looked at: cross-attention maps, averaged over heads, layers and steps.

What the DAAM: Interpreting Stable Diffusion Using Cross Attention, Tang et al. 2022, arXiv 2210.04885, section 3.1. Where image
and text attend in one row (Esser et al. 2024, arXiv 2403.03206, figure 2b), the map is that of the image's places over the
tokens alone: the columns of the image are left out and the others sum to 1 again. So it is in Flux's single blocks, where the
two are one row before the attention already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.attention import Site, attention_rule, split
from ldm_pipe.cond import ROWS
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.patch import Change, changed


@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """A Guide that watches one branch and changes no bit. size: (h, w) of x; sums: by size of the map, its sum and its count,
    begun anew with every denoiser that it makes."""

    network: nn.Module
    size: tuple[int, int]
    branch: str = "cond"
    sums: dict[tuple[int, int], tuple[Tensor, int]] = field(default_factory=dict)

    def __call__(self, denoise: Any) -> Any:
        """The denoiser, watched."""
        self.sums.clear()
        modules = dict(self.network.named_modules())
        joint = {n: [self._joint(m)] for n, m in modules.items() if getattr(m, "add_k_proj", None) is not None}
        for name in (n for n in modules if n.split(".")[-2:-1] == ["single_transformer_blocks"]):
            tokens: list[int] = []
            joint |= {name: [_counted(tokens)], f"{name}.attn": [self._single(modules[f"{name}.attn"], tokens)]}

        def watched(x: Tensor, level: Level) -> Any:
            with changed(self.network, joint) if joint else attention_rule(self.network, self._see):
                return denoise(x, level)

        return watched

    def _see(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        rows, shape = site.rows.of(self.branch), _shape(self.size, q.shape[2])
        if site.cross and rows is not None and shape is not None:
            self._add(shape, site.maps(q, k, rows).mean(1))
        return out

    def _joint(self, module: Any) -> Change:
        """A change that looks at what an attention of image and text is given, and lets it be."""

        def seen(call: Callable[..., Any], *, hidden_states: Tensor, encoder_hidden_states: Tensor, **given: Any) -> Any:
            rows, shape = ROWS.get().of(self.branch), _shape(self.size, hidden_states.shape[1])
            if rows is not None and shape is not None:
                places = given.get("image_rotary_emb")
                self._add(shape, joint_maps(module, hidden_states[rows], encoder_hidden_states[rows], places))
            return call(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **given)

        return seen

    def _single(self, module: Any, tokens: Sequence[int]) -> Change:
        """The same for an attention that is given both in one row, the text's `tokens` first."""

        def seen(call: Callable[..., Any], *, hidden_states: Tensor, **given: Any) -> Any:
            (count,), part = tokens, ROWS.get().of(self.branch)
            shape = _shape(self.size, hidden_states.shape[1] - count)
            if part is not None and shape is not None:
                text, image = hidden_states[part].tensor_split([count], dim=1)
                self._add(shape, joint_maps(module, image, text, given.get("image_rotary_emb")))
            return call(hidden_states=hidden_states, **given)

        return seen

    def _add(self, shape: tuple[int, int], maps: Tensor) -> None:
        """maps: [B,L,M]."""
        total, count = self.sums.get(shape, (torch.zeros_like(maps), 0))
        self.sums[shape] = total + maps, count + 1

    def maps(self) -> Tensor:
        """[B,M,h,w] at the size of x: how much each position looks at each of M tokens; they sum to 1 over the tokens. Raises
        UsageError where nothing was seen."""
        if not self.sums:
            raise UsageError("no cross-attention was seen: run the network first, or it has none")
        total: Tensor = sum((self._large(shape) for shape in self.sums), torch.zeros(()))
        return total / sum(count for _, count in self.sums.values())

    def _large(self, shape: tuple[int, int]) -> Tensor:
        total = self.sums[shape][0].mT
        total = total.reshape(*total.shape[:2], *shape)
        return F.interpolate(total, size=self.size, mode="bicubic", align_corners=False)


def _counted(tokens: list[int]) -> Change:
    """A change of a single block that notes how many tokens of text it is given."""

    def counted(call: Callable[..., Any], *, encoder_hidden_states: Tensor, **given: Any) -> Any:
        tokens[:] = [encoder_hidden_states.shape[1]]
        return call(encoder_hidden_states=encoder_hidden_states, **given)

    return counted


@torch.no_grad()
def joint_maps(module: Any, image: Tensor, text: Tensor, places: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[B,L,M]: how much image [B,L,C] looks at text [B,M,C] in a joint attention of diffusers, mean over the heads. The keys of
    the text are of a layer of their own, where it has one.

    places: cosines and sines [M+L,D] that turn queries and keys (Su et al. 2021, arXiv 2104.09864, eq. 34), the text's first.
    """
    apart = getattr(module, "add_k_proj", None)
    keys, norm_k = (module.to_k, module.norm_k) if apart is None else (apart, module.norm_added_k)
    q, k = split(module.to_q(image), module.heads), split(keys(text), module.heads)
    q, k = (t if norm is None else norm(t) for norm, t in ((module.norm_q, q), (norm_k, k)))
    if places is not None:
        count = text.shape[1]
        q, k = (_turned(t, *(p[part] for p in places)) for t, part in ((q, slice(count, None)), (k, slice(count))))
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
    heads = (torch.softmax(q[:, h] @ k[:, h].mT * q.shape[-1] ** -0.5, dim=-1) for h in range(q.shape[1]))
    return sum(heads, torch.zeros((), device=q.device)) / q.shape[1]


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x [B,heads,L,D], its channels turned in pairs."""
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cosines.to(x) + torch.stack([-odd, even], -1).flatten(-2) * sines.to(x)


def of_words(maps: Tensor, spans: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Maps [M,h,w] of tokens as maps [h,w] of words, each the mean of those of its tokens, from 0 to 1 each."""
    means = {word: maps[list(span)].mean(0) for word, span in spans.items() if len(span)}
    return {word: (m - m.min()) / (m.max() - m.min()).clamp_min(1e-12) for word, m in means.items()}


def _shape(size: tuple[int, int], length: int) -> tuple[int, int] | None:
    """The size of a map of so many positions: x halved some times, the odd ones rounded up."""
    height, width = size
    while height * width > length and height * width > 1:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == length else None
