"""Search the few times at which a model is best asked (AutoDiffusion, arXiv 2309.10438), and write them for `--spacing file`.

    python scripts/search_spacing.py --steps 4 --output four.json
    generate --prompt "a fox" --steps 4 --spacing file --set spacing.file=four.json

The fitness is the distance of the latents to those of a long walk from the same noise, relative to the size of the latter;
FID or a grader's accuracy would do as well, `ldm_pipe.analysis.Search` takes any function of the times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import Level, Pipeline, files, levels
from ldm_pipe.analysis import Search
from ldm_pipe.analysis.search import Times, even, walk_of

PROMPTS = ("a fox on a blue background", "two red apples on a white background", "a bee above a yellow boat", "a green book")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--reference", type=int, default=100, help="steps of the long walk")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    pipe = Pipeline.from_pretrained(args.model, dtype="fp32")
    path = pipe.bundle.model.path
    plan = pipe.plan(args.prompt or PROMPTS, seed=args.seed, sampler=args.sampler)

    def latents(walk: list[Level]) -> torch.Tensor:
        walked = replace(plan, levels=tuple(plan.sampler.walk(walk)))
        return torch.cat([out.latents for out in pipe.run(walked)])

    right = latents(levels.trailing(path, args.reference))

    def off(times: Times) -> float:
        return float((latents(walk_of(path, times)) - right).norm() / right.norm())

    places = round(path.last - path.first) + 1 if path.discrete else 1000
    starts = even(path, args.steps)
    for times in starts:
        print(f"even {list(times)}: {off(times):.4f}", flush=True)
    search = Search(population=args.population, epochs=args.epochs, seed=args.seed)
    found = search(off, places, starts)
    print(f"best {list(found.times)}: {found.fitness:.4f} of {found.measured} candidates")
    times = [float(path.time(level)) for level in walk_of(path, found.times)[:-1]]
    files.write(args.output, (json.dumps({"time": times}) + "\n").encode(), replace=True)


if __name__ == "__main__":
    main()
