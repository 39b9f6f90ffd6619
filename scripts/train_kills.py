"""Kill a training with SIGKILL at random moments, many times, and see that it ends with the weights of a straight run.

    python scripts/train_kills.py --kills 100

Prints one line: kills, how many of them were followed by a resume without help, steps lost at most, and whether the weights are
the same bit for bit. Exit code 0 only where all is well. The job is a toy (milliseconds a step, a checkpoint every two
steps), so that most kills fall into the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.job import Job, Task
from train.loop import run


class Toy(nn.Module):
    """Least squares with a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """x [B,3], y [B,1] -> loss."""
        each = (self.net(batch["x"]) - batch["y"]).square().mean(1)
        return {"loss": each.mean(), "each": each.detach()}


@dataclass(frozen=True)
class ToyTask(Task):
    """A task that takes milliseconds."""

    def net(self) -> nn.Module:
        """The network."""
        return Toy()

    def batch(self, seed: int, ids: Sequence[int]) -> dict[str, Any]:
        """Random inputs and their sums."""
        x = torch.from_numpy(np.stack([np.random.default_rng([seed, i]).standard_normal(3) for i in ids])).float()
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def export(self, net: Any, folder: Path) -> None:
        """The weights as numbers."""
        (folder / "weights.json").write_text(json.dumps([p.tolist() for p in net.parameters()]))


def job(folder: Path, steps: int) -> Job:
    """The toy job."""
    return Job(output=str(folder), steps=steps, batch=4, lr=0.01, warmup=5, save_every=2, log_every=1, keep=2, ema=0.9)


def forked(folder: Path, steps: int) -> int:
    """Train in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(folder.with_suffix(".txt"), "a", encoding="utf-8") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            run(ToyTask(), job(folder, steps))
        code = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    os._exit(code)


def trained(folder: Path) -> int:
    """The newest step of which a whole checkpoint stands."""
    from train.checkpoint import fault_of

    whole = [int(f.name[5:]) for f in folder.glob("step-*") if f.name[5:].isdigit() and not fault_of(f)]
    return max(whole, default=0)


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, steps = random.Random(args.seed), 20 * args.kills
    with tempfile.TemporaryDirectory() as temp:
        straight, killed = Path(temp, "straight"), Path(temp, "killed")
        began = time.perf_counter()
        os.waitpid(forked(straight, steps), 0)
        pace = (time.perf_counter() - began) / steps  # seconds a step
        kills = lost = failed = 0
        while kills < args.kills and trained(killed) < steps:
            before = trained(killed)
            child = forked(killed, steps)
            time.sleep(rng.uniform(0.02, 0.02 + 18 * pace))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                kills += 1
                lost = max(lost, before - trained(killed))
            else:
                failed += os.waitstatus_to_exitcode(status) != 0
        code = os.waitstatus_to_exitcode(os.waitpid(forked(killed, steps), 0)[1])
        names = [str(Path("export", "weights.json")), "log.jsonl"]
        whole = code == 0 and (straight / names[0]).read_bytes() == (killed / names[0]).read_bytes()
        losses = [[json.loads(line)["loss"] for line in (f / names[1]).read_text().splitlines()] for f in (straight, killed)]
        left = [p.name for p in killed.iterdir() if p.name.startswith(".ldm")]
        same = ["identical" if ok else "DIFFERENT" for ok in (whole, losses[0] == losses[1])]
        print(f"{kills} kills, {kills - failed} resumed, {lost} steps of a checkpoint lost, ", end="")
        print(f"weights {same[0]}, losses {same[1]}, {len(left)} leftovers")
        if code or failed:
            print(killed.with_suffix(".txt").read_text()[-2000:])
        return 0 if whole and losses[0] == losses[1] and not (failed or lost or left) and kills else 1


if __name__ == "__main__":
    sys.exit(main())
