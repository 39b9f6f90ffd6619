"""How far the hallucination score tells right images from wrong ones, by the grader. Into docs/results/hallucinations.*.

    python scripts/hallucinations.py       # a minute on one thread

Four draws of every prompt, with the walk that `--filter-hallucinations` walks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring

from ldm_pipe import Pipeline, files
from ldm_pipe.analysis.hallucination import FINE, scores
from ldm_pipe.doors.hallucinations import Filter
from train.world.grader import grade
from train.world.scenes import captions


def doubt(pipe: Pipeline, prompts: int, draws: int = 4) -> dict[str, float]:
    """How far the hallucination score tells images that the grader finds right from the others."""
    wanted = [s for kind in ("one", "two", "count") for s in measuring.scenes(kind, "train", prompts // 3, 59)]
    given = {"num_images": draws, "seed": 0, "batch_size": 48}
    whole = Filter(0.5).applied(pipe.bundle.model, pipe.plan([captions(s)[0] for s in wanted], **given))
    below, found, right, steps = float(whole.levels[-FINE - 1].u), [], list[bool](), []
    for out in pipe.run(whole, steps.append):
        found.append(scores(steps, below))
        steps.clear()
        right += [grade(np.asarray(i), wanted[k // draws]) for k, i in enumerate(out.images, len(right))]
    score, good = torch.cat(found).log().numpy(), np.array(right)
    rank = score.argsort().argsort() + 1
    n, m = int(good.sum()), int((~good).sum())
    tried = score.reshape(-1, draws)
    best = good.reshape(-1, draws)[np.arange(len(tried)), tried.argmin(1)]
    return {
        "samples": len(score),
        "correlation": float(np.corrcoef(score, good)[0, 1]),
        "auc": float((rank[~good].sum() - m * (m + 1) / 2) / max(1, n * m)),
        "right": 100 * float(good.mean()),
        "lowest_half": 100 * float(good[rank <= len(rank) / 2].mean()),
        "best_of_draws": 100 * float(best.mean()),
    }


def table(d: dict[str, Any]) -> str:
    """The page of results."""
    lines = [
        "# The hallucination score against the grader",
        "",
        f"On {d['samples']} images: correlation of its logarithm with the verdict {d['correlation']:.2f}, area under the curve "
        f"{d['auc']:.2f} (a wrong image has the higher score; .5 is chance). Right: {d['right']:.0f}% of all, "
        f"{d['lowest_half']:.0f}% of the half with the lowest scores, {d['best_of_draws']:.0f}% where of four draws the "
        "one with the lowest score is taken.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--prompts", type=int, default=39)
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    found = doubt(Pipeline.from_pretrained("builtin"), args.prompts)
    files.write(args.output / "hallucinations.json", (json.dumps(found, indent=1) + "\n").encode(), replace=True)
    files.write(args.output / "hallucinations.md", table(found).encode(), replace=True)
    print(table(found))


if __name__ == "__main__":
    main()
