"""Measure what `generate` and `Pipeline` promise, and write docs/results/doors.json.

    python scripts/doors.py                # everything (about 12 minutes on 2 cores)
    python scripts/doors.py --rounds 5 --runs 50 --output /tmp/doors

Bad inputs refused, start-up, replay bit for bit under every sampler, interrupts at random moments, false alarms and cost of
the finite checks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import ROOT, write

from ldm_pipe import registry

PROMPT = "a fox on a blue background"
GENERATE = [sys.executable, "-m", "ldm_pipe.cli"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def bad_inputs() -> dict[str, Any]:
    """The named cases and the random flags of the tests."""
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "test_bad_inputs.py")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    cases = len((ROOT / "tests" / "bad_inputs.jsonl").read_text(encoding="utf-8").splitlines())
    failed = re.search(r"(\d+) failed", found.stdout)
    return {"named cases": cases, "failed": int(failed[1]) if failed else 0, "exit": found.returncode}


def seconds(flags: list[str], rounds: int) -> float:
    """The median time of a command from launch to exit."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([*GENERATE, *flags], capture_output=True, check=False)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def light(folder: Path, rounds: int) -> dict[str, float]:
    """What answers without torch."""
    image = folder / "shown.png"
    subprocess.run([*GENERATE, "-p", PROMPT, "--steps", "1", "-o", str(image)], capture_output=True, check=True)
    asked = {"--help": ["--help"], "--version": ["--version"], "--list": ["--list"], "--show": ["--show", str(image)]}
    asked |= {"a wrong flag": ["--stepz=3"], "a wrong value": ["-p", "x", "--steps", "0"]}
    return {name: round(seconds(flags, rounds), 4) for name, flags in asked.items()}


def replays(folder: Path) -> dict[str, str]:
    """Verdict of --replay --verify for an image of every sampler, computed third in a batch of four."""
    verdicts = {}
    for name in sorted(registry.KINDS["sampler"]):
        made = folder / f"{name}-{{index}}.png"
        flags = ["-p", PROMPT, "--seed", "7", "--num-images", "4", "--steps", "6", "--sampler", name, "-o", str(made)]
        subprocess.run([*GENERATE, *flags], capture_output=True, check=True)
        replay = [*GENERATE, "--replay", str(folder / f"{name}-3.png"), "--verify"]
        found = subprocess.run(replay, capture_output=True, text=True, check=False)
        verdicts[name] = found.stdout.strip().partition(": ")[2] or found.stderr.strip()
    return verdicts


def interrupts(folder: Path, rounds: int) -> dict[str, Any]:
    """Signals at random moments of a run of many images: exit codes, time to exit, files that are not whole."""
    rng, wrong, partial, slowest = random.Random(0), 0, 0, 0.0
    for k in range(rounds):
        number = list(CODES)[k % len(CODES)]
        place = folder / f"round{k}"
        flags = ["-p", PROMPT, "--num-images", "4000", "--batch-size", "2", "--steps", "2", "-o", str(place)]
        run = subprocess.Popen(
            [*GENERATE, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where this runs in the background
        )  # fmt: skip
        time.sleep(rng.uniform(0.3, 6))
        began = time.perf_counter()
        run.send_signal(number)
        wrong += run.wait() != CODES[number]
        slowest = max(slowest, time.perf_counter() - began)
        found = list(place.iterdir()) if place.exists() else []
        # A killed process cannot tidy up: its temporary file is hidden and no image's name is ever taken by half a file.
        partial += sum(not f.read_bytes().endswith(b"IEND\xaeB`\x82") for f in found if f.suffix == ".png")
        partial += sum(f.suffix != ".png" for f in found) if number != signal.SIGKILL else 0
    return {"rounds": rounds, "wrong exit": wrong, "partial files": partial, "slowest exit, s": round(slowest, 2)}


def checks(runs: int) -> dict[str, Any]:
    """Runs of the built-in model: how many the finite checks refuse, and their share of the time."""
    from ldm_pipe import NumericalError, Pipeline, pipeline

    spent, real = 0.0, pipeline.finite

    def timed(t: Any, stage: str) -> Any:
        nonlocal spent
        began = time.perf_counter()
        try:
            return real(t, stage)
        finally:
            spent += time.perf_counter() - began

    pipe, alarms = Pipeline.from_pretrained("builtin", "cpu"), 0
    pipeline.finite = timed
    began = time.perf_counter()
    for seed in range(runs):
        try:
            pipe(PROMPT, seed=seed, steps=2)
        except NumericalError:
            alarms += 1
    whole = time.perf_counter() - began
    pipeline.finite = real
    return {"runs": runs, "false alarms": alarms, "share of the time": round(spent / whole, 5)}


def main() -> None:
    """Run all measurements and write them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=60, help="of interrupts")
    p.add_argument("--runs", type=int, default=1000, help="with finite checks")
    p.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    args = p.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts: dict[str, Callable[[], Any]] = {
            "bad inputs": bad_inputs,
            "seconds without torch": lambda: light(folder, 11),
            "replay": lambda: replays(folder),
            "interrupts": lambda: interrupts(folder, args.rounds),
            "finite checks": lambda: checks(args.runs),
        }
        found = {}
        for part, measure in parts.items():
            found[part] = measure()
            print(f"{part}: {json.dumps(found[part])}", flush=True)
    write(args.output, "doors", found)


if __name__ == "__main__":
    main()
