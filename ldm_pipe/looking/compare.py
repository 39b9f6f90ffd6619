"""What `generate` does for --sweep and --doctor: several runs, and what they say of each other."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ldm_pipe import files, recipe
from ldm_pipe.looking import doctor, sweep
from ldm_pipe.output import Target
from ldm_pipe.request import Request
from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan


def sweeps(
    request: Request,
    pipe: Pipeline,
    settings: dict[str, Any],
    planned: Callable[[dict[str, Any]], Plan],
    target: Target,
    values: Callable[[Output], dict[str, object]],
) -> int:
    """Run every combination of --sweep from the same noise; write a sheet and a JSON file. Returns the exit code."""
    settings = {**settings, "seed": pipe.resolve(Settings(**{**settings, "strength": None})).seed}
    runs = [(label, functools.partial(planned, given)) for label, given in request.looking().runs(settings)]
    rows = []
    for row in sweep.run(pipe, runs):
        rows.append(row)
        if not request.quiet:
            print(f"{row.label}: {row.seconds:.1f} s", file=sys.stderr)
    sheet = target.write(recipe.encode(sweep.sheet(rows), None, target.format), values(rows[0].output), "-sweep")
    facts = files.write(sheet.with_suffix(".json"), sweep.report(rows), replace=True)
    print(json.dumps({"sheet": str(sheet), "report": str(facts)}) if request.json else f"{sheet}\n{facts}")
    return 0


def examine(request: Request) -> int:
    """Compare dtypes and attention backends on this machine, a line each, and say which to take. Returns the exit code."""
    from ldm_pipe.device import pick_device
    from ldm_pipe.pipeline import Pipeline

    device, found = pick_device(request.device), []

    def open_in(dtype: str, attention: str) -> Pipeline:
        return Pipeline.from_pretrained(request.model, str(device), dtype, attention, **request.loading())

    for finding in doctor.examine(open_in, device.type == "cuda"):
        found.append(finding)
        if not request.json:
            print(finding, flush=True)
    says = doctor.verdict(found)
    print(json.dumps({"findings": [dataclasses.asdict(f) for f in found], "verdict": says}) if request.json else says)
    return 0
