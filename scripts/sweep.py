"""How often the built-in model is right, with 95% intervals, for all combinations of settings on the same prompts and seeds.

    python scripts/sweep.py sampler=ddim,dpm2m steps=10,25 guidance_scale=1,2,3 --prompts 60

`generate --sweep` takes the same words and makes pictures of any model; this names what is in them, by the grader.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from measuring import graded, scenes, share, write

from ldm_pipe import Pipeline
from ldm_pipe.errors import UsageError
from ldm_pipe.looking.flags import Looking
from train.world.scenes import captions

KINDS = (("one", "train"), ("two", "train"), ("count", "train"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", nargs="+", metavar="K=V,V")
    parser.add_argument("--prompts", type=int, default=90, help="in all, of the three kinds in equal parts")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    base = {"sampler": None, "spacing": None, "sampler_set": {}, "spacing_set": {}, "batch_size": 50}
    try:
        runs = list(Looking(sweep=tuple(args.sweep)).runs(base))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from error
    wanted = [s for kind in KINDS for s in scenes(*kind, args.prompts // len(KINDS), 55)]
    pipe, rows = Pipeline.from_pretrained("builtin"), dict[str, Any]()
    for label, settings in runs:
        out = pipe([captions(s)[0] for s in wanted], seeds=tuple(range(len(wanted))), **settings)
        seen = sum(out.evaluations.values()) / len(wanted)
        rows[label] = {**share(graded(out.images, wanted), len(wanted)), "evaluations": seen}
        print(label, {k: round(v, 1) for k, v in rows[label].items()}, flush=True)
    command = f"python scripts/sweep.py {' '.join(args.sweep)}"
    text = f"# A sweep over the built-in model\n\n{len(wanted)} prompts on the same seeds, `{command}`.\n"
    text += "\n| settings | right, % | evaluations |\n|---|---:|---:|\n"
    for label, r in rows.items():
        text += f"| {label} | {r['right']:.0f} ({r['low']:.0f} to {r['high']:.0f}) | {r['evaluations']:.0f} |\n"
    write(args.output, "sweep", rows, text)


if __name__ == "__main__":
    main()
