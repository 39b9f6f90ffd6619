"""Draw runs at random, sampler x guidance rule x restoration, edit or mask, and see that they compose.

    python scripts/composition.py --runs 400        # composition.md into docs/results/

What is registered is drawn; nothing here names a method. `tests/test_composition.py` holds the laws over fewer runs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import NumericalError, Pipeline, UsageError, files, registry
from ldm_pipe.edit import Edit
from ldm_pipe.level import Level
from ldm_pipe.plan import Plan
from ldm_pipe.restoration import Inpainting, Restoration

SOURCE, TARGET, SEED = "a fox on a blue background", "a cat on a blue background", 7
GIVEN = {"lo": "0.2", "hi": "0.9"}  # values of a rule's fields that have no default
LOOSE = {"tolerance": 0.1}  # where a tolerance decides how often a network is asked
WRAPPED = "cfg(1.5) | "  # what a rule that wraps another is put around
NOTE = """# Composition

{runs} runs ({distinct} distinct) drawn at random from the registry: {sampler} samplers x {rule} guidance rules x {restoration}
restorations of `pool(4)` or under a mask, {editing} editing methods, or none of these (`python scripts/composition.py`), each
through the door that a user takes. {ran} ran; {right} of them report as many evaluations as the network saw. {refused} were
refused, each in one sentence:

| refused | what the user sees | for example |
|---:|---|---|
"""


class Drawn(NamedTuple):
    """A run: the names of a sampler and a rule, and what is done with them: "none", "restoration", "mask" or "editing"."""

    sampler: str
    rule: str
    kind: str = "none"
    method: str = ""


@dataclass
class Seen:
    """What a run did: its latents, what it says it evaluated, what the network saw, the levels at which it was asked."""

    plan: Plan
    latents: torch.Tensor
    reported: Counter[str]
    images: int = 0
    asked: list[Level] = field(default_factory=list)


def draws(count: int, seed: int) -> list[Drawn]:
    """`count` runs in which every registered sampler, rule and method stands about equally often."""
    rng = random.Random(seed)
    methods = [(kind, n) for kind in ("restoration", "editing") for n in sorted(registry.KINDS[kind])]
    methods += [("mask", n) for n in ("keep", *sorted(registry.KINDS["restoration"]))] + [("none", "")]
    columns = [sorted(registry.KINDS["sampler"]), sorted(registry.KINDS["rule"]), methods]
    decks: list[list[Any]] = [[], [], []]
    found = []
    for _ in range(count):
        for deck, column in zip(decks, columns, strict=True):
            if not deck:
                deck += rng.sample(column, len(column))
        found.append(Drawn(decks[0].pop(), decks[1].pop(), *decks[2].pop()))
    return found


def guide(rule: str, fields: str | None = None) -> str:
    """The rule as `--guide` takes it."""
    known = dict(registry.entry("rule", rule).fields)
    if fields is None:
        fields = ", ".join(f"{n}={GIVEN[n]}" for n, default in known.items() if default == "required" and n in GIVEN)
    return (WRAPPED if "rule" in known else "") + f"{rule}({fields})"


def planned(pipe: Pipeline, run: Drawn, fields: dict[str, Any] | None = None, **settings: Any) -> Plan:
    """The plan of a run through its door, of two images. fields: of its method. settings: over those of `Settings`."""
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
        out = next(pipe.run(replace(plan, guides=(listen, *plan.guides))))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, started = Pipeline.from_pretrained(args.model, "cpu", "fp32"), time.perf_counter()
    runs = draws(args.runs, args.seed)
    refused: dict[str, list[Drawn]] = {}
    wrong = []
    for run in runs:
        found = attempt(pipe, run)
        if isinstance(found, str):
            refused.setdefault(found, []).append(run)
        elif sum(found.reported.values()) != found.images:
            wrong.append(run)
    count, sizes = sum(map(len, refused.values())), {kind: len(names) for kind, names in registry.KINDS.items()}
    text = NOTE.format(
        runs=len(runs),
        distinct=len(set(runs)),
        ran=len(runs) - count,
        right=len(runs) - count - len(wrong),
        refused=count,
        **sizes,
    )
    for sentence, which in sorted(refused.items(), key=lambda item: -len(item[1])):
        text += f"| {len(which)} | {sentence} | {' x '.join(filter(None, which[0]))} |\n"
    text += "".join(f"\nMiscounted: {' x '.join(run)}\n" for run in wrong)
    args.output.mkdir(parents=True, exist_ok=True)
    files.write(args.output / "composition.md", text.encode(), replace=True)
    print(f"{len(runs)} runs, {count} refused, {len(wrong)} miscounted, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
