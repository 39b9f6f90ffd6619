"""Start-up against diffusers: ours up to the end of the first sampling step, theirs only until the pipeline is loaded.

    python scripts/bench/startup.py [--rounds 5] [--json]

Fresh processes in turn, the same shipped folder, one round that is not counted before the others. wall: from launching the
process to the line that the child prints when it is done, by the clock that both share; cpu: user and system seconds of the
whole child, its exit included. The ratio is theirs / ours, of the medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ldm_pipe" / "builtin"
OURS = """
from ldm_pipe import Pipeline
pipe = Pipeline.from_pretrained(folder, "cpu", "fp32")
next(iter(pipe.steps("a fox on a blue background", seed=1)))
"""
THEIRS = """
from diffusers import StableDiffusionPipeline
StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
"""
END = "\nimport sys, time\nprint(time.monotonic(), len(sys.modules))\n"
CODE = {"ours": OURS, "diffusers": THEIRS}
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors")


def once(code: str) -> dict[str, float]:
    """One fresh process: seconds of wall clock and of CPU, and how many modules it imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    command = [sys.executable, "-c", f"folder = {str(FOLDER)!r}\n{code}{END}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended, modules = done.stdout.split()[-2:]
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": float(ended) - began, "cpu": cpu, "modules": float(modules)}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Every measurement of every side; the sides take turns, and turns at being first."""
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": [], "modules": []} for name in CODE}
    for turn in range(rounds + 1):
        for name in list(CODE)[:: 1 if turn % 2 else -1]:
            for unit, value in once(CODE[name]).items():
                found[name][unit] += [value] if turn else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print everything that was measured as JSON")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds takes 1 or more")
    found = measure(asked.rounds)
    medians = {name: {unit: statistics.median(v) for unit, v in units.items()} for name, units in found.items()}
    ratio = {unit: medians["diffusers"][unit] / medians["ours"][unit] for unit in ("wall", "cpu")}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    if asked.json:
        print(json.dumps({"rounds": asked.rounds, "medians": medians, "ratio": ratio, "all": found, "versions": versions}))
        return
    for name, units in found.items():
        for unit in ("wall", "cpu"):
            low, high = min(units[unit]), max(units[unit])
            print(f"{name:9} {unit:4} {medians[name][unit]:6.2f} s (median of {asked.rounds}, {low:.2f} to {high:.2f})")
    print(f"ratio: wall x{ratio['wall']:.2f}, cpu x{ratio['cpu']:.2f}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()))


if __name__ == "__main__":
    main()
