"""`accelerate launch -m train --config configs/<job>.toml [--set job.steps=100 ...]` (or `python -m train`)."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_pipe import strict
from ldm_pipe.errors import LdmError, UsageError, unknown

TASKS = {"codec": "train.tasks.codec:Codec", "clip": "train.tasks.clip:Clip", "latent": "train.tasks.latent:Latent"}


def read_recipe(path: str, settings: Sequence[str]) -> dict[str, Any]:
    """The tables of a recipe, with `table.key=value` settings written over them. Raises UsageError."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path!r} is not TOML: {error}") from error
    for setting in settings:
        key, equals, value = setting.partition("=")
        table, dot, field = key.partition(".")
        if not (equals and dot and isinstance(recipe.get(table), dict)):
            raise UsageError(f"--set {setting!r} is not of the form table.key=value with table in {', '.join(recipe)}")
        recipe[table][field] = value
    return recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="train", description="Train by a recipe; resumes where it was stopped.")
    parser.add_argument("--config", required=True, metavar="FILE.toml", help="the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="override one value")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        recipe = read_recipe(args.config, args.set)
        folder = _run(recipe, args.config)
        if os.environ.get("RANK", "0") == "0":
            print(f"exported to {folder}")
        return 0
    except LdmError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(recipe: dict[str, Any], where: str) -> Path:
    name = recipe.get("task", {}).pop("name", None)
    if name not in TASKS:
        raise UsageError(f"{where}: " + unknown("task", str(name), TASKS))
    from train.loop import Job, run

    module, _, cls = TASKS[name].partition(":")
    job = strict.build(Job, recipe.get("job", {}), f"{where} [job]")
    task = strict.build(getattr(importlib.import_module(module), cls), recipe["task"], f"{where} [task]")
    return run(task, job)


if __name__ == "__main__":
    sys.exit(main())
