"""Measure every rule of guidance on the built-in model: accuracy by the grader, evaluations and time per image.

    python scripts/guidance.py                      # guidance_rules.md and .json into docs/results/
    python scripts/guidance.py --prompts 6 --only cfg adaptive

Every rule draws the same prompts from the same noise. LinearAG is fitted first, on other prompts; the weak model of
autoguidance and the milder one of noise-damped guidance are the model itself with its innermost self-attention removed.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import graded, share, write

from ldm_pipe import Pipeline
from ldm_pipe.guidance.autoguidance import Autoguidance
from ldm_pipe.guidance.linear_ag import LinearAG, Recording, solve
from ldm_pipe.guidance.noise_damped import NoiseDamped
from ldm_pipe.model import Model
from ldm_pipe.perturb import self_attentions
from train.world import draw_scene
from train.world.scenes import Scene, captions

KINDS = (("one", "train"), ("two", "train"), ("count", "train"), ("two", "pair"))
BATCH = 50
# What is measured: texts of `--guide`, S the model's own scale; None is made below. This U-Net hardly uses its middle, where
# the perturbed branches look by default.
RULES: dict[str, str | None] = {
    "none": "cfg(1)",
    "cfg": "cfg(S)",
    "adaptive": "cfg(S) | adaptive",
    "linear_ag": None,
    "between": "cfg(S) | between(0.2, 0.9)",
    "rescale": "cfg(S) | rescale(0.7)",
    "curve": "curve(1, S, 'linear')",
    "curve, parabola": "curve(1, S, 'parabola')",
    "threshold": "cfg(S) | threshold(0.995, 3)",
    "apg": "apg(S)",
    "cfg_zero": "cfg_zero(S)",
    "cfgpp, with ddim": "cfgpp(0.6)",
    "tcfg": "tcfg(S)",
    "compose": "compose(('cond',), (S,))",  # one prompt: CFG, in other words
    "perp_neg": "perp_neg(S, ('text:a picture',))",
    "autoguidance": None,
    "noise_damped": None,
    "pag": "cfg(S) | pag(1, layers='up_blocks.1')",
    "seg": "cfg(S) | seg(1, layers='up_blocks.1')",
    "sag": "cfg(S) | sag(0.5, layers='up_blocks.1')",
    "skip_layer": "cfg(S) | skip_layer(1, layers='up_blocks.1')",
    "clip": "cfg(S) | clip(50)",
}
NOTE = """# Rules of guidance on the built-in model

{count} prompts, in turn one object, two, several of one kind, and two of a pair held out of training; the same noise for every
rule, {steps} steps of {sampler} (`python scripts/guidance.py --prompts {count}`). Right: by the grader, with its 95% Wilson
interval. Evaluations: of the network per image, all branches. Time: of the processor, against CFG's. The scales were not
searched for: the table says what a rule does at one setting, not which is best.
"""


def prompts(count: int, seed: int) -> list[Scene]:
    """`count` scenes, the kinds in turn; their random stream is not the training's."""
    rng = np.random.default_rng([seed, count])
    return [draw_scene(rng, *KINDS[i % len(KINDS)]) for i in range(count)]


def weaker(model: Model) -> Model:
    """The model without its innermost self-attention: its output projection is zero."""
    weak = copy.deepcopy(model)
    for attention in self_attentions(weak.network).values():
        for parameter in attention.get_submodule("to_out").parameters():
            parameter.data.zero_()
    return weak


def fitted(pipe: Pipeline, scale: float, count: int) -> LinearAG:
    """LinearAG, fitted on `count` other prompts."""
    recording = Recording(scale)
    pipe([captions(s)[0] for s in prompts(count, 909)], rule=recording, batch_size=BATCH, seed=10**6)
    given = pipe.plan("", guidance_scale=scale).given
    return LinearAG(solve(recording.runs, str(given.sampler), int(given.steps or 0), scale))


def settings(pipe: Pipeline, name: str, scale: float, count: int) -> dict[str, Any]:
    """What the pipeline is called with for one row."""
    text = RULES[name]
    if text is not None:
        more = {"sampler": "ddim"} if name.endswith("ddim") else {}
        return {"guide": text.replace("S", f"{scale:g}"), **more}
    if name == "linear_ag":
        return {"rule": fitted(pipe, scale, max(6, min(100, count // 4)))}
    return {"rule": (Autoguidance if name == "autoguidance" else NoiseDamped)(2.0, weaker(pipe.bundle.model))}


def measure(pipe: Pipeline, scenes: list[Scene], given: dict[str, Any]) -> dict[str, Any]:
    """One row. Image i has seed i."""
    right, evaluations, seconds = 0, 0, 0.0
    for first in range(0, len(scenes), BATCH):
        part, start = scenes[first : first + BATCH], time.process_time()
        out = pipe([captions(s)[0] for s in part], seeds=tuple(range(first, first + len(part))), batch_size=BATCH, **given)
        seconds += time.process_time() - start
        evaluations += sum(out.evaluations.values())
        right += graded(out.images, part)
    row = {**share(right, len(scenes)), "guide": given.get("guide")}
    return {**row, "evaluations": evaluations / len(scenes), "seconds": seconds}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, in the order of RULES."""
    lines = ["| rule | right, % | interval | evaluations | time | `--guide` |", "|---|---:|---:|---:|---:|---|"]
    for name in (n for n in RULES if n in rows):
        row = rows[name]
        ratio = f"{row['seconds'] / rows['cfg']['seconds']:.2f}" if "cfg" in rows else ""
        text = f"`{row['guide']}`".replace("|", "\\|") if row["guide"] else "from Python"
        middle = f"{row['right']:.1f} | {row['low']:.1f} to {row['high']:.1f} | {row['evaluations']:.1f}"
        lines.append(f"| {name} | {middle} | {ratio} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--only", nargs="*", choices=list(RULES), default=list(RULES), metavar="RULE")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained("builtin")
    usual, scenes, rows = pipe.plan("").given, prompts(args.prompts, 33), dict[str, Any]()
    note = NOTE.format(count=len(scenes), steps=usual.steps, sampler=usual.sampler)
    for name in args.only:
        rows[name] = measure(pipe, scenes, settings(pipe, name, float(usual.guidance_scale or 1.0), args.prompts))
        print(name, rows[name], flush=True)
        write(args.output, "guidance_rules", rows, note + "\n" + table(rows))


if __name__ == "__main__":
    main()
