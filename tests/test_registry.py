"""Methods by name: built strictly, listed from their source without torch, wrong names answered with the nearest."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from ldm_pipe import CFG, VP, Between, Rescale, UsageError, build, registry
from ldm_pipe.codec import Identity
from ldm_pipe.guidance.linear_ag import Fit
from ldm_pipe.level import Level
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.walk import Sampler


@dataclasses.dataclass(frozen=True)
class Sum:
    """A log-probability like any other."""

    def __call__(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        return x.flatten(1).sum(1)


VALUES: dict[str, Any] = {
    "lo": 0.1, "hi": 0.9, "sampler": DDIM(), "codec": Identity(),
    "measurement": Measurement(Mask(), torch.zeros(1, 3, 8, 8), 0.1),
    "background": torch.zeros(1, 4, 8, 8), "keep": torch.ones(1, 1, 8, 8),
    "log_prob": Sum(), "by": Sum(), "below": 0.2, "experts": (Sum(),), "hint": torch.zeros(1, 3, 8, 8),
    "network": torch.nn.Identity(), "features": (torch.zeros(1, 4, 8, 8),), "direction": torch.ones(4),
    "fit": Fit("ddim", 0, 5.0, (), (), ()), "tokens": torch.zeros(1, 4, 16), "absent": torch.zeros(1, 4, 16), "weights": (),
    "adapter": torch.nn.Identity(), "states": torch.zeros(1, 4, 16),
}  # fmt: skip
EVERY = [(kind, name) for kind, names in registry.KINDS.items() for name in names]
every = pytest.mark.parametrize(("kind", "name"), EVERY)


def required(kind: str, name: str) -> dict[str, Any]:
    """Values for the fields that have no default."""
    return {n: VALUES[n] for n, default in registry.entry(kind, name).fields if default == "required"}


@every
def test_every_entry_builds_with_its_defaults(kind: str, name: str) -> None:
    made = build(kind, name, **required(kind, name))
    if kind == "sampler":
        assert isinstance(made, Sampler)
        assert dataclasses.is_dataclass(made)
    if kind == "spacing" and name != "file":  # which has no levels of its own
        assert made(VP.linear(), 4)[-1] == (1.0, 0.0)
    if kind == "rule":
        assert "cond" in made.needs(VP.linear().level(500)) or hasattr(made, "fresh")  # one that leaves its first steps out


@every
def test_every_entry_says_what_it_is(kind: str, name: str) -> None:
    entry = registry.entry(kind, name)
    assert entry.name == name
    assert len(entry.summary) > 20
    assert "\n" not in entry.summary
    assert not entry.summary.endswith(".")


@every
def test_listed_fields_and_defaults_are_those_of_the_code(kind: str, name: str) -> None:
    """Read from the source by AST, they equal what the imported class or function has."""
    module, _, attribute = registry.target(kind, name).partition(":")
    found = getattr(importlib.import_module(module), attribute)
    listed = dict(registry.entry(kind, name).fields)
    parameters = list(inspect.signature(found).parameters.values())
    if not inspect.isclass(found):
        assert [p.name for p in parameters[:2]] == ["path", "steps"]
        parameters = parameters[2:]
    assert list(listed) == [p.name for p in parameters]
    for p in parameters:
        if p.default is p.empty:
            assert listed[p.name] == "required"
        elif isinstance(p.default, bool | int | float | str | None):
            assert ast.literal_eval(listed[p.name]) == p.default


def test_lists_import_no_torch() -> None:
    code = (
        "import sys; from ldm_pipe import registry\n"
        "assert all(registry.entries(k) for k in registry.KINDS)\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_fields_are_given_by_name() -> None:
    assert build("sampler", "ddim") == DDIM(0.0)
    assert build("sampler", "ddim", eta=0.5) == build("sampler", "ddim", eta="0.5") == DDIM(0.5)
    assert build("sampler", "heun", average="flow").average == "flow"
    assert build("rule", "between", lo=0, hi="1") == Between(0.0, 1.0, CFG())
    assert build("rule", "rescale", rule=CFG(3.0), phi=1) == Rescale(1.0, CFG(3.0))
    karras = build("spacing", "karras", rho="5", sigma_max=None)
    assert isinstance(karras, functools.partial)
    assert karras.keywords == {"rho": 5.0, "sigma_max": None}


@pytest.mark.parametrize(
    ("kind", "name", "fields", "message"),
    [
        ("samplr", "ddim", {}, "'samplr' is not a kind of method; did you mean 'sampler'"),
        ("sampler", "dimm", {}, "'dimm' is not a sampler; did you mean 'ddim'"),
        ("sampler", "zzzz", {}, "'zzzz' is not a sampler; choose from consistency, ddim"),
        ("sampler", "ddim", {"etta": 0.5}, "'etta' is not a field of sampler ddim; did you mean 'eta'"),
        ("spacing", "karras", {"roh": 5}, "'roh' is not a field of spacing karras; did you mean 'rho'"),
        ("spacing", "karras", {"path": 5}, "'path' is not a field of spacing karras"),
        ("sampler", "ddim", {"eta": "much"}, "sampler ddim: eta is 'much'; it takes a"),
        ("sampler", "ddim", {"eta": True}, "sampler ddim: eta is True"),
        ("sampler", "heun", {"average": "mean"}, "sampler heun: average is 'mean'; choose from ve, flow, x0"),
        ("sampler", "heun", {"calls": 3}, "'calls' is not a field of sampler heun"),
        ("spacing", "leading", {"offset": 0.5}, "spacing leading: offset is 0.5; it takes a whole number"),
        ("rule", "between", {"lo": 0.2}, "rule between needs hi"),
        ("rule", "rescale", {"rule": "cfg"}, "rule rescale: rule is 'cfg'"),
        ("rule", "rescale", {"rule": DDIM()}, "rule rescale: rule is DDIM(eta=0.0)"),
    ],
)
def test_what_is_wrong_is_named(kind: str, name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(kind, name, **fields)
    assert message in str(caught.value)


def test_unknown_kinds_cannot_be_listed() -> None:
    with pytest.raises(UsageError, match="did you mean 'rule'"):
        registry.entries("rules")


def test_entries_come_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, names in list(registry.KINDS.items()):
        monkeypatch.setitem(registry.KINDS, kind, dict(reversed(names.items())))
        assert [e.name for e in registry.entries(kind)] == sorted(names)
