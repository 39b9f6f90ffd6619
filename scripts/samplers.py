"""Measure every registered sampler on a closed-form Gaussian: its order, its cost, and how near it comes in few evaluations.

    python scripts/samplers.py                      # samplers.md and samplers.json into docs/results/ (a few seconds)

Everything is exact propagation of a mean and a covariance: no network, no random numbers, the same table on every machine.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import VP, Flow, Gaussian, Level, build, files, levels, registry
from ldm_pipe.analysis import gaussian_w2, outcome, reference_problem
from ldm_pipe.model import Estimate
from ldm_pipe.walk import Sampler

BUDGETS = (5, 10, 20, 50)
NOTE = """# Samplers on a closed-form Gaussian

Eight values with mean sin(k) and covariance 0.9^|i - j| (total deviation sqrt(8) = 2.83), every sampler with defaults, exact
propagation of mean and covariance (`python scripts/samplers.py`).

- order: log2 of how the W2 distance falls from 40 to 80 steps, from pure noise to u = 0.1 on the flow path with growing steps.
  It is the order of the whole distribution: a sampler with fresh noise has the order of its moments. About 0 means that more
  steps do not lead to the distribution: so it is for the samplers of distilled networks, for DDRM's kernel, and where the
  default adds more noise than it removes (EDM's s_noise).
- calls: evaluations of the network in a full step; the step into sigma = 0 takes one.
- W2 at 5, 10, 20 and 50 evaluations at most, over `trailing` levels of the linear VP table down to clean. Lower is better; the
  ranking is that of a Gaussian and of a perfect network, not of images.
"""


def prior() -> Gaussian:
    """The reference problem's covariance, with a mean."""
    covariance = reference_problem("pool2", 0.0).covariance
    return Gaussian(torch.arange(len(covariance), dtype=torch.float64).sin(), covariance)


def exact(x0: Gaussian, x: torch.Tensor, level: Level) -> Estimate:
    """The denoiser, with a learned variance halfway between its bounds for the sampler that asks for one."""
    return x0(x, level)._replace(log_var=torch.zeros_like(x))


def distance(x0: Gaussian, sampler: Sampler, walk: list[Level]) -> float:
    """W2 between what a walk makes and what lies at its last level."""
    alpha, sigma = walk[-1]
    right = alpha * x0.mean, alpha**2 * x0.covariance + sigma**2 * torch.eye(len(x0.mean), dtype=torch.float64)
    return gaussian_w2(outcome(lambda x, level: exact(x0, x, level), walk, sampler, (len(x0.mean), 1, 1)), right)


def order(x0: Gaussian, sampler: Sampler) -> float:
    """The power of the step by which that distance falls. The first step shrinks as a square: a low order there is hidden."""

    def walk(count: int) -> list[Level]:
        return [Flow().level(1000 * (1 - 0.9 * (i / count) ** 2)) for i in range(count + 1)]

    coarse, fine = (distance(x0, sampler, walk(n)) for n in (40, 80))
    return math.log2(coarse / fine)


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    sampler, x0 = build("sampler", name), prior()
    row: dict[str, Any] = {"calls": sampler.calls, "order": round(order(x0, sampler), 2), "w2": {}}
    for budget in BUDGETS:
        steps = (budget - 1) // sampler.calls + 1
        row["w2"][budget] = float(f"{distance(x0, sampler, levels.trailing(VP.linear(), steps)):.3g}")
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, by name."""
    head = ["sampler", "order", "calls", *(f"W2 at {b}" for b in BUDGETS), "defaults"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for name, row in rows.items():
        fields = ", ".join(f"{n}={default}" for n, default in registry.entry("sampler", name).fields)
        cells = [name, f"{row['order']:.1f}", row["calls"], *row["w2"].values(), fields.replace('"', "").replace("'", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="*", default=sorted(registry.KINDS["sampler"]), metavar="SAMPLER")
    args = parser.parse_args()
    rows = {}
    for name in args.only:
        rows[name] = measure(name)
        print(name, rows[name], flush=True)
    files.write(args.output / "samplers.json", (json.dumps(rows, indent=1) + "\n").encode(), replace=True)
    files.write(args.output / "samplers.md", (NOTE + "\n" + table(rows)).encode(), replace=True)


if __name__ == "__main__":
    main()
