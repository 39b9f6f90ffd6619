"""Runs drawn at random, sampler x rule x restoration, edit or mask x patch: what is registered is drawn, none is named."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ldm_pipe import NumericalError, Pipeline, UsageError, registry
from ldm_pipe.doors.edit import Edit
from ldm_pipe.doors.patches import Patches
from ldm_pipe.doors.restoration import Inpainting, Restoration
from ldm_pipe.level import Level
from ldm_pipe.pipeline import Output
from ldm_pipe.plan import Plan

SOURCE, TARGET, SEED = "a fox on a blue background", "a cat on a blue background", 7
GIVEN = {"lo": "0.2", "hi": "0.9"}  # values of a rule's fields that have no default
LOOSE = {"tolerance": 0.1}  # where a tolerance decides how often a network is asked
WRAPPED = "cfg(1.5) | "  # what a rule that wraps another is put around
SMALL = {"attention_scale": "(4)", "faster": "('0 2')", "tiles": "(4)"}  # values under which a patch acts on a short small run


class Drawn(NamedTuple):
    """A run: the names of a sampler and a rule, what is done with them, "none", "restoration", "mask" or "editing", and the
    patch under which the network runs, "" for none."""

    sampler: str
    rule: str
    kind: str = "none"
    method: str = ""
    patch: str = ""


@dataclass
class Seen:
    """What a run did: its latents, what it says it evaluated, what the network saw, the levels at which it was asked."""

    plan: Plan
    latents: torch.Tensor
    reported: Counter[str]
    images: int = 0
    asked: list[Level] = field(default_factory=list)


def patches() -> list[str]:
    """The patches that a text describes, and "" for none."""
    entries = {name: registry.entry("patch", name).fields for name in sorted(registry.KINDS["patch"])}
    return ["", *(name for name, fields in entries.items() if "required" not in dict(fields).values())]


def draws(count: int, seed: int) -> list[Drawn]:
    """`count` runs in which every registered sampler, rule, method and patch stands about equally often."""
    rng = random.Random(seed)
    methods = [(kind, n) for kind in ("restoration", "editing") for n in sorted(registry.KINDS[kind])]
    methods += [("mask", n) for n in ("keep", *sorted(registry.KINDS["restoration"]))] + [("none", "")]
    columns = [sorted(registry.KINDS["sampler"]), sorted(registry.KINDS["rule"]), methods, patches()]
    decks: list[list[Any]] = [[] for _ in columns]
    found = []
    for _ in range(count):
        for deck, column in zip(decks, columns, strict=True):
            if not deck:
                deck += rng.sample(column, len(column))
        found.append(Drawn(decks[0].pop(), decks[1].pop(), *decks[2].pop(), decks[3].pop()))
    return found


def guide(rule: str, fields: str | None = None) -> str:
    """The rule as `--guide` takes it."""
    known = dict(registry.entry("rule", rule).fields)
    if fields is None:
        fields = ", ".join(f"{n}={GIVEN[n]}" for n, default in known.items() if default == "required" and n in GIVEN)
    return (WRAPPED if "rule" in known else "") + f"{rule}({fields})"


def planned(pipe: Pipeline, run: Drawn, fields: dict[str, Any] | None = None, **settings: Any) -> Plan:
    """The plan of a run through its doors, of two images. fields: of its method. settings: over those of `Settings`."""
    texts = (run.patch + SMALL.get(run.patch, ""),) if run.patch else ()
    return Patches(texts).applied(pipe, _bare(pipe, run, fields, settings))


def _bare(pipe: Pipeline, run: Drawn, fields: dict[str, Any] | None, settings: dict[str, Any]) -> Plan:
    """The plan without the patch."""
    width, height = pipe.bundle.defaults.size
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture, small = Image.fromarray(noise), Image.fromarray(noise[: height // 4, : width // 4])
    white = Image.new("L", (width, height))
    white.paste(255, (0, 0, width // 2, height))
    loose = {n: v for n, v in LOOSE.items() if n in dict(registry.entry("sampler", run.sampler).fields)}
    given = {"sampler": run.sampler, "sampler_set": loose, "steps": 4, "spacing": "trailing", "seed": SEED}
    given |= {"guide": guide(run.rule), **settings}
    two = {**given, "seeds": (SEED, SEED)}
    if run.kind == "restoration":
        return Restoration("pool(4)", run.method, fields or {}, 0.1).plan(pipe, [SOURCE, TARGET], small, **two)
    if run.kind == "mask":
        known = {} if run.method == "keep" else fields or {}
        return Inpainting(run.method, known, 0.1).plan(pipe, [SOURCE, TARGET], picture, white, **two)
    if run.kind == "editing":
        return Edit(SOURCE, TARGET, run.method, fields or {}).plan(pipe, **given)
    return pipe.plan([SOURCE, TARGET], **two)


def done(pipe: Pipeline, plan: Plan) -> Seen:
    """Run a plan, listening at the network and around the guided denoiser. Raises UsageError where it is refused."""
    seen = Seen(plan, torch.empty(0), Counter())

    def listen(denoise: Any) -> Any:
        def ask(x: torch.Tensor, level: Level) -> Any:
            seen.asked.append(level)
            return denoise(x, level)

        return ask

    def count(model: Any, args: Any, out: Any) -> None:
        seen.images += len(args[0])

    hook = pipe.bundle.model.register_forward_hook(count)
    try:
        out = Output.joined(list(pipe.run(replace(plan, guides=(listen, *plan.guides)))))
    finally:
        hook.remove()
    seen.latents, seen.reported = out.latents, out.evaluations
    return seen


def attempt(pipe: Pipeline, run: Drawn, **more: Any) -> Seen | str:
    """What a run did, or the sentence by which it was refused or left off where numbers ran away."""
    try:
        return done(pipe, planned(pipe, run, **more))
    except (UsageError, NumericalError) as error:
        return str(error)
