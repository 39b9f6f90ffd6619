"""Steps answered ahead of time: where the way down of a U-Net is that of a key step, the ways up of the steps after it do not
wait for each other and are one call (Faster Diffusion, Li et al. 2023, arXiv 2312.09608, section 3.2, parallel)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm_pipe.cond import ROWS


@dataclass(frozen=True, eq=False)
class Ahead:
    """The state of one run. times: of every step, by the noise u of its level, falling. keys: the steps that are computed. At a
    key the batch of the way up holds every step up to the next key; at those, what was kept is given, if the tokens and the
    branches are the same. Elsewhere everything is computed."""

    times: Mapping[float, float]
    keys: tuple[int, ...]
    kept: dict[tuple[float, tuple[str, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)
    copies: list[int] = field(default_factory=lambda: [1])

    def changes(self, names: Iterable[str]) -> dict[str, Callable[..., Any]]:
        """The changes of the modules of the way down, and of the network."""
        return {**dict.fromkeys(names, self._once), "": self._network}

    def _once(self, call: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """The first of the copies, for all of them."""
        copies = self.copies[0]
        if copies == 1:
            return call(*args, **given)
        size = len(next(a for a in (*args, *given.values()) if isinstance(a, Tensor))) // copies
        first = call(*each(args, lambda t: t[:size]), **each(given, lambda t: t[:size]))
        return each(first, lambda t: t.repeat(copies, *[1] * (t.ndim - 1)))

    def _network(self, call: Callable[..., Any], x: Tensor, time: Tensor, **given: Any) -> Any:
        rows, u, tokens = ROWS.get(), float(ROWS.get().level.u), given["encoder_hidden_states"]
        walk, whole = list(self.times), not rows.counts
        if u not in self.times or not whole:
            return call(x, time, **given)
        found = self.kept.pop((u, rows.branches), None)
        if found is not None and found[0].shape == tokens.shape and torch.equal(found[0], tokens):
            return (found[1],)
        now = walk.index(u)
        until = min((k for k in self.keys if k > now), default=len(walk)) if now in self.keys else now + 1
        copies = until - now
        if copies == 1:
            return call(x, time, **given)
        moments = torch.cat([time.expand(len(x)), *(time.new_full((len(x),), self.times[w]) for w in walk[now + 1 : until])])
        given = each(given, lambda t: t.repeat(copies, *[1] * (t.ndim - 1)) if t.ndim and len(t) == len(x) else t)
        self.copies[0] = copies
        try:
            outs = call(x.repeat(copies, 1, 1, 1), moments, **given)[0].chunk(copies)
        finally:
            self.copies[0] = 1
        self.kept.clear()
        self.kept.update({(w, rows.branches): (tokens, out) for w, out in zip(walk[now + 1 : until], outs[1:], strict=True)})
        return (outs[0],)


def each(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """`f` of every tensor in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return f(value) if value.ndim else value
    if isinstance(value, Mapping):
        return {n: each(v, f) for n, v in value.items()}
    return type(value)(each(v, f) for v in value) if isinstance(value, tuple | list) else value
