"""`accelerate launch -m train --config configs/<job>.toml [--set job.steps=100 ...]` (or `python -m train`).

`python -m train check --config ...` lists every fault of the recipe and its data instead, and trains nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ldm_pipe.errors import LdmError
from train import recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run or check one job. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    checking = words[:1] == ["check"]
    args = _parser(checking).parse_args(words[checking:])
    try:
        tables = recipe.read(args.config, args.set)
        if checking:
            return _check(tables, args.config)
        return _train(tables, args)
    except LdmError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped at once; the last checkpoint is kept", file=sys.stderr)
        return 130


def _parser(checking: bool) -> argparse.ArgumentParser:
    says = "List every fault of a recipe and its data." if checking else "Train by a recipe; goes on where it was stopped."
    parser = argparse.ArgumentParser(prog="train check" if checking else "train", description=says)
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="override one value")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if not checking:
        parser.add_argument("--allow-changed", action="store_true", help="go on although the recipe or the data changed")
    return parser


def _train(tables: dict[str, Any], args: argparse.Namespace) -> int:
    task, job = recipe.build(tables, args.config)
    from train.loop import run

    folder = run(task, job, args.allow_changed)
    if os.environ.get("RANK", "0") == "0":
        print(f"exported to {folder}")
    return 0


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
