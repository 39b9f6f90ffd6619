"""Draw runs at random, sampler x guidance rule x restoration, edit or mask x patch, and see that they compose.

    python scripts/composition.py --runs 400        # composition.md into docs/results/

`tests/test_composition.py` holds the laws over fewer runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drawn_runs import Drawn, attempt, draws, patches

from ldm_pipe import Pipeline, files, registry

NOTE = """# Composition

{runs} runs ({distinct} distinct) drawn at random from the registry: {sampler} samplers x {rule} guidance rules x {restoration}
restorations of `pool(4)` or under a mask, {editing} editing methods, or none of these x {patch} patches of the network or none
(`python scripts/composition.py`), each through the doors that a user takes. {ran} ran; {right} of them report as many
evaluations as the network saw. {refused} were refused, each in one sentence:

| refused | what the user sees | for example |
|---:|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, started = Pipeline.from_pretrained(args.model, "cpu", "fp32"), time.perf_counter()
    runs = draws(args.runs, args.seed)
    refused: dict[str, list[Drawn]] = {}
    wrong = []
    for run in runs:
        found = attempt(pipe, run)
        if isinstance(found, str):
            refused.setdefault(found, []).append(run)
        elif sum(found.reported.values()) != found.images:
            wrong.append(run)
    args.output.mkdir(parents=True, exist_ok=True)
    count, sizes = sum(map(len, refused.values())), {kind: len(names) for kind, names in registry.KINDS.items()}
    text = NOTE.format(
        runs=len(runs),
        distinct=len(set(runs)),
        ran=len(runs) - count,
        right=len(runs) - count - len(wrong),
        refused=count,
        **{**sizes, "patch": len(patches()) - 1},
    )
    for sentence, which in sorted(refused.items(), key=lambda item: -len(item[1])):
        text += f"| {len(which)} | {sentence} | {' x '.join(filter(None, which[0]))} |\n"
    text += "".join(f"\nMiscounted: {' x '.join(run)}\n" for run in wrong)
    files.write(args.output / "composition.md", text.encode(), replace=True)
    print(f"{len(runs)} runs, {count} refused, {len(wrong)} miscounted, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
