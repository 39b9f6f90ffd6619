"""What changes a network for the duration of a run: a change stands around a module's forward, in this thread alone.

A `Patch` is a frozen dataclass that names modules and says what is to happen around each; `Patched` makes a Guide of it, so
that it composes with samplers, guidance, restoration and edits, as `Attending` does of a rule for attention. No weight is
touched. While anybody is inside `changed`, the modules that are named carry a forward that looks for the changes of its own
thread; the last one to leave takes it off.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm_pipe.attention import AttentionRule, InputRule, attention_rule, sites_of
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate, Model

MISFIT = ("must match the size of tensor", "Sizes of tensors must match")  # what torch says of shapes that cannot be joined
# (call, *what the module is given) -> what it is to return; call: the module's own forward, or the change inside this one.
Change = Callable[..., Any]
Tap = Callable[[Rows, Tensor], Tensor | None]  # (what the rows are, a module's output) -> another in its place, or None


@dataclass(frozen=True)
class Run:
    """What a patch may know of a run. levels: of the walk. times: of the network's own clock at each of them but the last."""

    levels: tuple[Level, ...]
    times: tuple[float, ...] = ()

    @classmethod
    def of(cls, model: Model, levels: Sequence[Level]) -> Run:
        """Of a model's walk."""
        return cls(tuple(levels), tuple(float(model.path.time(level)) for level in levels[:-1]))

    @property
    def clock(self) -> dict[float, float]:
        """The times by the noise u of their levels, falling; {} where they are not known."""
        found = {float(level.u): time for level, time in zip(self.levels, self.times, strict=False)}
        return dict(sorted(found.items(), reverse=True))

    @property
    def steps(self) -> int:
        """How many levels are left, each counted once."""
        return len(self._depths)

    def index(self, level: Level) -> int:
        """The number of the step that leaves a level: how many levels of the walk hold more noise. Between two levels (the
        midpoint of a sampler) it is that of the noisier one."""
        u = float(level.u)
        return max(0, sum(depth >= u for depth in self._depths) - 1)

    @cached_property
    def _depths(self) -> set[float]:
        return {float(level.u) for level in self.levels[:-1]}


class Patch:
    """Base of the patches: frozen dataclasses whose `changes` is asked afresh for every run, so that they keep no state.

    `neutral`: fields under which the patch changes no bit.
    """

    neutral: ClassVar[Mapping[str, Any]] = {}

    def changes(self, network: nn.Module, run: Run) -> Mapping[str, Change]:
        """A change for each module by name ("" is the network itself). Raises UsageError where the network lacks them."""
        raise TypeError(f"{type(self).__name__} has no changes")

    def sampler(self, inner: Any, run: Run) -> Any:
        """The sampler of a patched run; most patches leave it as it is."""
        return inner


_CHANGES: ContextVar[Mapping[int, tuple[Change, ...]]] = ContextVar("_CHANGES")
_LOCK = threading.Lock()
_INSIDE: dict[int, int] = {}  # how many runs want a module's forward to look for changes, by the id of the module


@contextmanager
def changed(network: nn.Module, changes: Mapping[str, Sequence[Change]]) -> Iterator[None]:
    """Let changes, the first one innermost, stand around modules of a network. Contexts nest, the inner one inside.

    Raises UsageError on a name that is no module, saying what would be one.
    """
    modules = {name: network.get_submodule(name) for name in matching(network, changes)}
    before = _CHANGES.get({})
    added = {id(m): (*changes[n], *before.get(id(m), ())) for n, m in modules.items()}
    token = _CHANGES.set({**before, **added})
    try:
        with _LOCK:
            for module in modules.values():
                _enter(module)
        yield
    finally:
        with _LOCK:
            for module in modules.values():
                _leave(module)
        _CHANGES.reset(token)


def _enter(module: nn.Module) -> None:
    _INSIDE[id(module)] = _INSIDE.get(id(module), 0) + 1
    if _INSIDE[id(module)] == 1:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = own
            for change in _CHANGES.get({}).get(id(module), ()):
                call = partial(change, call)
            return call(*args, **kwargs)

        forward.own = module.__dict__.get("forward")  # type: ignore[attr-defined]
        module.__dict__["forward"] = forward


def _leave(module: nn.Module) -> None:
    _INSIDE[id(module)] -= 1
    if _INSIDE[id(module)] == 0:
        del _INSIDE[id(module)]
        own = module.__dict__.pop("forward").own
        if own is not None:
            module.__dict__["forward"] = own


def matching(network: nn.Module, names: Iterable[str]) -> list[str]:
    """The names, each that of a module. Raises UsageError on another, which lists the modules at that place."""
    known = dict(network.named_modules())
    for name in names:
        if name not in known:
            stem = name
            while stem not in known:
                stem = stem.rpartition(".")[0]
            here = [n for n in known if n.rpartition(".")[0] == stem and n] or list(known)
            raise UsageError(unknown(f"layer of {type(network).__name__}", name, here))
    return list(names)


def check_unet(network: nn.Module, what: str) -> None:
    """Raises UsageError where a network has no way down, middle and way up, which `what` acts on."""
    if not all(hasattr(network, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        raise UsageError(f"{what} needs a U-Net; {type(network).__name__} has no way down and up")


def noting_size(size: list[int]) -> Change:
    """A change of the network itself that notes the height and width of every x it is given, for those further in."""

    def sized(call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        size[:] = x.shape[2:]
        return call(x, *args, **kwargs)

    return sized


def root(model: Model) -> nn.Module:
    """The network of a model as patches name its modules. Raises UsageError where it has none."""
    network: Any = getattr(model.network, "unet", model.network)
    if not isinstance(network, nn.Module):
        raise UsageError("this model's network is a function; a patch needs modules")
    return network


@dataclass(frozen=True, eq=False)
class Patched:
    """A Guide: every evaluation of the denoiser runs with the patches in the model's network, the first one innermost. Their
    state starts afresh with every denoiser that it makes."""

    model: Model
    patches: tuple[Patch, ...]
    run: Run

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser with the patches in place."""
        network, changes = root(self.model), dict[str, list[Change]]()
        for patch in self.patches:
            for name, change in patch.changes(network, self.run).items():
                changes.setdefault(name, []).append(change)

        def patched(x: Tensor, level: Level) -> Estimate:
            with changed(network, changes):
                try:
                    return denoise(x, level)
                except RuntimeError as error:
                    if not any(words in str(error) for words in MISFIT):
                        raise
                    names = ", ".join(type(patch).__name__ for patch in self.patches)
                    raise UsageError(f"{names}: what is added has not the size of the features here: {error}") from error

        return patched


@contextmanager
def feature_tap(network: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Read or replace the outputs of named modules while the `with` runs, in this thread alone; nothing is left behind.

    taps: functions by the name of a module, or by the end of one: "up_blocks.1.resnets.0". Of two taps on one module the inner
    comes first. Raises UsageError where a name fits no module or several.
    """

    def around(tap: Tap) -> Change:
        def tapped(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            found = tap(ROWS.get(), out)
            return out if found is None else found

        return tapped

    with changed(network, {name_ending_in(network, name): [around(tap)] for name, tap in taps.items()}):
        yield


def name_ending_in(network: nn.Module, name: str) -> str:
    """The name of the one module whose name is, or ends in, `name`. Raises UsageError that lists what would fit."""
    names = [n for n, _ in network.named_modules()]
    found = [name] if name in names else [n for n in names if n.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    near = ", ".join((found or difflib.get_close_matches(name, names, 5, 0.3))[:5])
    raise UsageError(f"{name!r} fits {len(found) or 'no'} modules of the network{near and '; one would fit '}{near}")


@dataclass(frozen=True, eq=False)
class Attending:
    """A Guide: every evaluation of the denoiser runs with `rule` in the attention of `network` and with its `taps`."""

    network: nn.Module
    rule: AttentionRule | InputRule
    taps: Mapping[str, Tap] = field(default_factory=dict)

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser under the rule."""
        sites = sites_of(self.network)

        def run(x: Tensor, level: Level) -> Estimate:
            with attention_rule(self.network, self.rule, sites), feature_tap(self.network, self.taps):
                return denoise(x, level)

        return run
