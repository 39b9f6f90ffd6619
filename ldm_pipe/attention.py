"""The one place that touches attention: its backends, and the hook through which a rule sees and changes it.

A rule is active while a `with attention_rule(network, rule)` runs, in this thread alone, and leaves nothing behind: the modules
look for one at every call and find none. `Attending` makes a Guide of it, so that it composes with samplers and guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level

Backend = Literal["sdpa", "math"]


def set_backend(network: Any, backend: Backend) -> None:
    """Choose how a diffusers network computes attention.

    "sdpa": torch's fused kernel. "math": two matrix products and a softmax; on a CPU its backward pass is faster at the small
    sequence lengths of small latents (measured x1.18 on a whole training step of the built-in model's U-Net).
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    processors = {"sdpa": AttnProcessor2_0, "math": AttnProcessor}
    if backend not in processors:
        raise UsageError(f"attention {backend!r} is not a backend; choose from {', '.join(processors)}")
    network.set_attn_processor(processors[backend]())


class Site(NamedTuple):
    """Where and when attention happens. name: of the module in its network; cross: to the tokens, or of the image to itself;
    rows: what the rows of the batch are."""

    name: str
    cross: bool
    rows: Rows


class AttentionRule(Protocol):
    """What may change attention: sees queries, keys and values by head and what they give, and returns what is to be given."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """q [B,heads,L,D], k and v [B,heads,M,D], out [B,heads,L,D] the usual result -> out, or another in its place."""


_active: ContextVar[tuple[Mapping[int, str], AttentionRule] | None] = ContextVar("_active", default=None)


@contextmanager
def attention_rule(network: nn.Module, rule: AttentionRule) -> Iterator[None]:
    """Let a rule into every attention of a network. Raises UsageError where the network has none that takes rules."""
    names = {id(m): n for n, m in network.named_modules() if getattr(m, "takes_rules", False)}
    if not names:
        raise UsageError(f"{type(network).__name__} has no attention that takes a rule")
    token = _active.set((names, rule))
    try:
        yield
    finally:
        _active.reset(token)


def ruled(module: nn.Module, cross: bool, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
    """What the active rule makes of an attention's result; the result itself where there is no rule for this module."""
    active = _active.get()
    if active is None or id(module) not in active[0]:
        return out
    return active[1](Site(active[0][id(module)], cross, ROWS.get()), q, k, v, out)


@dataclass(frozen=True, eq=False)
class Attending:
    """A Guide: every evaluation of the denoiser runs with `rule` in the attention of `network`."""

    network: nn.Module
    rule: AttentionRule

    def __call__(self, denoise: Any) -> Any:
        """The denoiser under the rule."""

        def run(x: Tensor, level: Level) -> Any:
            with attention_rule(self.network, self.rule):
                return denoise(x, level)

        return run
