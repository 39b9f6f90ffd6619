"""Seconds from launching `generate` to a written PNG, in fresh processes.

python scripts/bench/cold_start.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 3
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "ldm_pipe.cli"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMANDS = {
    "generate --version": ["--version"],
    "generate --list": ["--list"],
    "generate, a wrong flag": ["--stepz", "3"],
    "generate, one image, 25 steps": ["--prompt", "a fox on a blue background", "--steps", "25", "--seed", "1"],
    "generate, 16 images, 25 steps": ["--prompt", "a fox on a blue background", "--steps", "25", "--num-images", "16"],
}


def main() -> None:
    for name, flags in COMMANDS.items():
        spent = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                done = subprocess.run(COMMAND + flags, cwd=folder, env=ENV, capture_output=True, check=False)
                spent.append(time.perf_counter() - began)
                if done.returncode != (2 if "wrong" in name else 0):
                    sys.exit(f"error: {name}: {done.stderr.decode()[-300:]}")
        print(f"{name:32} {statistics.median(spent):6.2f} s (median of {ROUNDS}, {min(spent):.2f} to {max(spent):.2f})")


if __name__ == "__main__":
    main()
