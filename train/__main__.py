"""`accelerate launch -m train --config configs/<job>.toml [--set job.steps=100 ...]` (or `python -m train`).

`python -m train check --config ...` lists every fault of the recipe and its data instead, and trains nothing.
`python -m train average --config ... --width 0.08 -o folder` exports an average of another width (job.post_hoc).
`python -m train merge --model M --lora a.safetensors:0.8 --lora b.safetensors -o folder` makes them part of a model.
`python -m train concepts --concept runs/a/export="a <toy> fox" ... -o FILE` merges trainings of Custom Diffusion.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_pipe.errors import LdmError
from train import recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run or check one job. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words and words[0] in SAYS else ""
    args = _parser(command).parse_args(words[bool(command) :])
    try:
        if command in MERGES:
            return MERGES[command](args)
        tables = recipe.read(args.config, args.set)
        if command == "check":
            return _check(tables, args.config)
        return _average(tables, args) if command else _train(tables, args)
    except LdmError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped at once; the last checkpoint is kept", file=sys.stderr)
        return 130


SAYS = {
    "": "Train by a recipe; goes on where it was stopped.",
    "check": "List every fault of a recipe and its data.",
    "average": "Export the model with an average of another width.",
    "merge": "Write a model with adapters in its weights, or several adapters as one.",
    "concepts": "Make one file of several trainings of Custom Diffusion.",
}


EXPORT = "an export and a caption with its word; two folders or more, each named again for more captions"


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"train {command}".strip(), description=SAYS[command])
    if command in MERGES:
        parser.add_argument("--model", default="builtin", metavar="FOLDER", help='"builtin" or a folder')
    if command == "concepts":
        parser.add_argument(
            "--concept",
            action="append",
            default=[],
            metavar="FOLDER=CAPTION",
            help="an export and a caption with its word; two folders or more, each again for more captions",
        )
        parser.add_argument("--captions", required=True, metavar="FILE.txt", help="on which the least changes, one a line")
        parser.add_argument(
            "--weight", type=float, default=3.0, help="how much the concepts count beside the captions; inf: exactly (3)"
        )
        parser.add_argument("--ridge", type=float, default=0.0, help="above 0 where captions are few")
    elif command == "merge":
        parser.add_argument("--lora", action="append", default=[], metavar="FILE[:scale]", help="an adapter; any number")
        parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of what is written")
    else:
        parser.add_argument("--config", required=True, metavar="FILE.toml", help="the recipe")
        parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="override one value")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if not command:
        parser.add_argument("--allow-changed", action="store_true", help="go on although the recipe or the data changed")
    if command == "average":
        parser.add_argument("--width", type=float, required=True, help="sigma_rel of the average, 0 to 0.288")
        parser.add_argument("--step", type=int, help="after so many steps (all of them)")
    if command in ("average", *MERGES):
        parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where it goes")
    return parser


def _train(tables: dict[str, Any], args: argparse.Namespace) -> int:
    task, job = recipe.build(tables, args.config)
    from train.loop import run

    folder = run(task, job, args.allow_changed)
    if os.environ.get("RANK", "0") == "0":
        print(f"exported to {folder}")
    return 0


def _average(tables: dict[str, Any], args: argparse.Namespace) -> int:
    from ldm_pipe import files
    from train.post_hoc import reconstruct

    task, job = recipe.build(tables, args.config)
    weights = reconstruct(Path(job.output) / "averages", args.width, args.step)
    net = task.net()
    net.load_state_dict(weights)
    with files.new_folder(args.output) as temp:
        task.export(net, temp)
    print(f"exported to {args.output}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from train.merge import merge

    for words in merge(args.model, args.lora, Path(args.output), args.dtype):
        print(words, file=sys.stderr)
    print(f"merged into {args.output}")
    return 0


def _concepts(args: argparse.Namespace) -> int:
    from train.concepts import concepts

    for words in concepts(args.model, args.concept, args.captions, Path(args.output), args.weight, args.ridge):
        print(f"use it with {words}")
    return 0


MERGES = {"merge": _merge, "concepts": _concepts}  # what takes no recipe


def _check(tables: dict[str, Any], where: str) -> int:
    """Print the faults, the fatal ones first: 0 where there are none of those, else 2."""
    found = recipe.faults(tables, where)
    if not found:
        task, job = recipe.build(tables, where)
        found = task.check(job)
    fatal = sum(f.fatal for f in found)
    for fault in sorted(found, key=lambda f: not f.fatal):
        print(f"{fault.where}: {'' if fault.fatal else 'note: '}{fault.words}")
    print(f"{fatal} fault(s), {len(found) - fatal} note(s)")
    return 2 if fatal else 0


if __name__ == "__main__":
    sys.exit(main())
