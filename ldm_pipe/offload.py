"""Weights that stay on the CPU and visit the device when they are used: for models larger than the device's memory.

`model`: one part (a text encoder, the network, the codec) is on the device at a time and stays until another is used.
`sequential`: a block of a part is there for as long as it computes; slow, and as small as it gets. Nothing is copied back: a
weight that leaves the device is again the tensor that it was before, so no bit of a model changes.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond

BLOCKS = 12  # a block holds at most this fraction of its part, where that can be divided
DEPTH = 2  # below a part's root, modules through which it may be entered: an autoencoder's decode calls its children


@dataclass(frozen=True, eq=False)
class Offload:
    """The parts of a bundle, each visiting `device` when it is used. Make it with `of`; one thread computes at a time.

    how: "model" or "sequential". fetch: makes the tensor on the device of the one at home. away: by id, every tensor that is
    on the device and what it is at home. open: what the calls that are running have brought, the innermost last. there: the
    part that is whole on the device, of "model".
    """

    parts: Mapping[str, nn.Module]
    how: str
    device: torch.device
    fetch: Callable[[Tensor], Tensor]
    away: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    open: list[list[Tensor]] = field(default_factory=list)
    there: set[str] = field(default_factory=set)
    handles: list[Any] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    @classmethod
    def of(
        cls, parts: Mapping[str, nn.Module], how: str, device: torch.device, fetch: Callable[[Tensor], Tensor] | None = None
    ) -> Offload:
        """Hooks around the modules of parts whose weights lie on the CPU. fetch: `tensor.to(device)` by default."""
        made = cls(parts, how, device, fetch or (lambda t: t.to(device)))
        made.install()
        return made

    def install(self) -> None:
        """Put the hooks in place."""
        for name, part in self.parts.items():
            entries = dict.fromkeys(_entries(part), _tensors(part)) if self.how == "model" else _visitors(part)
            for module, tensors in {part: [], **entries}.items():
                before = module.register_forward_pre_hook(partial(self._before, name, tensors), with_kwargs=True)
                self.handles.extend((before, module.register_forward_hook(self._after, always_call=True)))

    def remove(self) -> None:
        """Take everything home and the hooks off."""
        self.home()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Without hooks, all weights at home, while the `with` runs: for those who change or copy them."""
        with self.lock:
            self.remove()
            try:
                yield
            finally:
                self.install()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A run, which no other disturbs. All weights are home when it ends, also by an error."""
        with self.lock:
            depth = len(self.open)
            try:
                yield
            finally:
                while len(self.open) > depth:  # an interrupt passes by the hooks
                    self.open.pop()
                    self.lock.release()
                self.home()

    def home(self) -> None:
        """Take every weight home, also one that others have moved to the device."""
        with self.lock:
            self._leave([t for t, _ in self.away.values()])
            for part in self.parts.values():
                for tensor in _tensors(part):
                    if tensor.device.type != "cpu":
                        tensor.data = tensor.data.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _before(self, part: str, tensors: list[Tensor], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.lock.acquire()
        brought: list[Tensor] = []
        self.open.append(brought)
        if part not in self.there:
            if self.how == "model":
                self._leave([t for t, _ in self.away.values()])
            self._bring(tensors, brought)
            self.there.update([part] if self.how == "model" else ())
        return _moved(args, self.device), _moved(kwargs, self.device)

    def _after(self, module: nn.Module, args: Any, out: Any) -> None:
        if self.open:
            brought = self.open.pop()
            if self.how == "sequential":
                self._leave(brought)
            self.lock.release()

    def _bring(self, tensors: list[Tensor], brought: list[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self.away:
                there = self.fetch(tensor.data)
                self.away[id(tensor)] = (tensor, tensor.data)
                tensor.data = there
                brought.append(tensor)

    def _leave(self, tensors: list[Tensor]) -> None:
        self.there.clear()
        for tensor in tensors:
            tensor.data = self.away.pop(id(tensor))[1]


def modules(value: Any) -> Iterator[nn.Module]:
    """The networks in a part of a bundle, however deep in its fields."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from modules(item)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from modules(getattr(value, f.name))


def _tensors(module: nn.Module, own: bool = False) -> list[Tensor]:
    """The parameters and buffers of a module, each once. own: without those of its children."""
    return list({id(t): t for t in (*module.parameters(not own), *module.buffers(not own))}.values())


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _entries(part: nn.Module, depth: int = DEPTH) -> Iterator[nn.Module]:
    """A part and the modules under it, lists of modules not counted as a step."""
    yield part
    for child in part.children() if depth else ():
        yield from _entries(child, depth - (not isinstance(child, nn.ModuleList)))


def _visitors(part: nn.Module) -> dict[nn.Module, list[Tensor]]:
    """The modules of a part that bring weights, and which: blocks all of theirs, and every owner its own, for code that calls
    it without its block (DiT asks its first block for the vector of the time)."""
    found = {module: own for module in part.modules() if (own := _tensors(module, own=True))}
    return found | {block: _tensors(block) for block in _blocks(part, _bytes(_tensors(part)) / BLOCKS)}


def _blocks(module: nn.Module, most: float) -> Iterator[nn.Module]:
    for child in module.children():
        listed = isinstance(child, nn.ModuleList | nn.ModuleDict)
        deep = any(True for inner in child.children() for _ in inner.children())  # else it may read its children's weights
        if listed or (deep and _bytes(_tensors(child)) > most):
            yield from _blocks(child, most)
        else:
            yield child


def _moved(value: Any, device: torch.device) -> Any:
    """What a module is given, its tensors on the device."""
    if isinstance(value, Tensor | Cond):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(v, device) for v in value)
    return value
