"""The one place that touches attention: its backends, and the hook through which a rule sees and changes it.

A rule is active while a `with attention_rule(network, rule)` runs, in this thread alone, and leaves nothing behind: the modules
look for one at every call and find none. `patch.Attending` makes a Guide of it, so that it composes with samplers and guidance.
Rules nest like parcels: what an outer one sees has passed the inner ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.errors import UsageError

Backend = Literal["sdpa", "math"]
FUSED, PLAIN = "AttnProcessor2_0", "AttnProcessor"  # the processors of diffusers whose place a rule can take


def set_backend(network: Any, backend: Backend) -> None:
    """Choose how a diffusers network computes attention.

    "sdpa": torch's fused kernel. "math": two matrix products and a softmax; on a CPU its backward pass is faster at small
    sequence lengths (measured x1.18 on a whole training step of the built-in model's U-Net).
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    processors = {"sdpa": AttnProcessor2_0, "math": AttnProcessor}
    if backend not in processors:
        raise UsageError(f"attention {backend!r} is not a backend; choose from {', '.join(processors)}")
    network.set_attn_processor(processors[backend]())


def split(t: Tensor, heads: int) -> Tensor:
    """[B,L,C] -> [B,heads,L,C/heads]."""
    return t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)


class Site(NamedTuple):
    """Where and when attention happens. name: of the module in its network; cross: to the tokens, or of the image to itself;
    rows: what the rows of the batch are; values: the module's values [N,heads,M,D] of tokens [N,M,C]; bias: what is added
    before the softmax, [B,heads,1 or L,M], where the network masks tokens."""

    name: str
    cross: bool
    rows: Rows
    values: Callable[[Tensor], Tensor]
    bias: Tensor | None = None

    def maps(self, q: Tensor, k: Tensor, rows: slice | list[int]) -> Tensor:
        """Attention maps of some rows of the batch, softmax(q k^T / sqrt(D) + bias), [N,heads,L,M] in at least fp32 (Vaswani
        et al. 2017, arXiv 1706.03762, eq. 1)."""
        kind = torch.promote_types(q.dtype, torch.float32)
        logits = q[rows].to(kind) @ k[rows].to(kind).mT * q.shape[-1] ** -0.5
        return torch.softmax(logits if self.bias is None else logits + self.bias[rows].to(kind), dim=-1)


class AttentionRule(Protocol):
    """What may change attention: sees queries, keys and values by head and what they give, and returns what is to be given."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """q [B,heads,L,D], k and v [B,heads,M,D], out [B,heads,L,D] the usual result -> out, or another in its place."""


class InputRule(Protocol):
    """What may change the queries, keys and values before they meet. A rule may be this and an AttentionRule at once."""

    def inputs(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,heads,L,D], k and v [B,heads,M,D] -> the same, or others of these shapes in their place."""


@dataclass(frozen=True, eq=False)
class _Active:
    names: Mapping[int, str]  # of the modules, by their id
    before: Callable[[Site, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None
    after: AttentionRule | None


_active: ContextVar[tuple[_Active, ...]] = ContextVar("_active", default=())
_LOCK = threading.Lock()  # around every change of a diffusers processor


def sites_of(network: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that attend, by name: the light ones and diffusers' own. Raises UsageError on none."""
    found = {n: m for n, m in network.named_modules() if getattr(m, "takes_rules", False) or hasattr(m, "set_processor")}
    if not found:
        raise UsageError(f"{type(network).__name__} has no attention that takes a rule")
    return found


@contextmanager
def attention_rule(
    network: nn.Module, rule: AttentionRule | InputRule, sites: Mapping[str, nn.Module] | None = None
) -> Iterator[None]:
    """Let a rule into every attention of a network, light or diffusers' (its U-Nets, and transformers with self- and
    cross-attention such as PixArt). Inside another `with`, both apply. sites: where they are known already. Raises UsageError
    where the network has no attention that takes rules.
    """
    found = sites or sites_of(network)
    mine = _Active({id(m): n for n, m in found.items()}, getattr(rule, "inputs", None), rule if callable(rule) else None)
    with ExitStack() as stack:
        for name, module in found.items():
            if not getattr(module, "takes_rules", False):
                stack.enter_context(_processed(module, name))
        token = _active.set((*_active.get(), mine))
        try:
            yield
        finally:
            _active.reset(token)


def ruled(
    module: nn.Module,
    cross: bool,
    inputs: tuple[Tensor, Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    values: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """attend(*inputs) as the active rules would have it, [B,heads,L,D]; as it is where there is none for this module."""
    here = [(a, Site(a.names[id(module)], cross, ROWS.get(), values, bias)) for a in _active.get() if id(module) in a.names]
    for a, site in here:
        inputs = a.before(site, *inputs) if a.before else inputs
    out = attend(*inputs)
    for a, site in reversed(here):
        out = a.after(site, *inputs, out) if a.after else out
    return out


@dataclass(frozen=True, eq=False)
class _Processor:
    """A diffusers attention processor in the place of its `usual` one, for as long as a rule of any thread needs it."""

    usual: Any
    users: set[object] = field(default_factory=set)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B,L,C] or [B,C,H,W]; the names are diffusers'. What the usual one gives where no rule is active."""
        if not any(id(attn) in a.names for a in _active.get()):
            return self.usual(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        x = hidden_states if hidden_states.ndim == 3 else hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        y = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            y = attn.norm_encoder_hidden_states(y)
        q, k, v = (split(t, attn.heads) for t in (attn.to_q(x), attn.to_k(y), attn.to_v(y)))
        q, k = (t if norm is None else norm(t) for norm, t in ((attn.norm_q, q), (attn.norm_k, k)))
        mask = attn.prepare_attention_mask(attention_mask, y.shape[1], len(x))  # [B * heads, 1 or L, M] or None
        bias = None if mask is None else mask.unflatten(0, (len(x), attn.heads))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if type(self.usual).__name__ == FUSED:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            scores = attn.get_attention_scores(q.flatten(0, 1), k.flatten(0, 1), mask)
            return (scores @ v.flatten(0, 1)).unflatten(0, q.shape[:2])

        out = ruled(attn, y is not x, (q, k, v), attend, lambda t: split(attn.to_v(t), attn.heads), bias)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype)))
        out = out if hidden_states.ndim == 3 else out.transpose(1, 2).reshape(hidden_states.shape)
        return (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor


@contextmanager
def _processed(attn: Any, name: str) -> Iterator[None]:
    """One attention of diffusers under our processor; its own is back once the last rule of all threads has left."""
    me = object()
    with _LOCK:
        mine = usual if isinstance(usual := attn.processor, _Processor) else _Processor(usual)
        if type(mine.usual).__name__ not in (FUSED, PLAIN) or attn.spatial_norm is not None:
            raise UsageError(f"{name} attends by {type(mine.usual).__name__}, which takes no rule")
        mine.users.add(me)
        attn.processor = mine
    try:
        yield
    finally:
        with _LOCK:
            mine.users.discard(me)
            if not mine.users and attn.processor is mine:
                attn.processor = mine.usual


def grid(places: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of attention's places over a latent of height x width that was halved some times or cut into patches.

    Raises UsageError where no factor gives so many.
    """
    for factor in range(1, max(height, width) + 1):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == places:
            return rows, columns
    raise UsageError(f"{places} positions of attention are no map of {height}x{width} latents")
