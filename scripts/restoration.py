"""Measure the restoration methods on the built-in model: PSNR, the grader's verdict and the data's residual, against baselines.

python scripts/restoration.py                   # restoration.{md,json} and a picture per problem into docs/results/
python scripts/restoration.py --problem "pool(4)"                # of one problem; the others stay
python scripts/restoration.py --anew                             # what is there is measured again, not continued
python scripts/restoration.py --pictures 4 --only dps --only ddnm --steps 50 --output /tmp/look
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from measuring import columns, kept, pyplot, write
from restoration_rows import PROBLEMS, Table, attempts, markdown

from ldm_pipe import Pipeline, registry

SHOWN, FULL = 4, 32
NOTE = """# Restoration on the built-in model

Seeds paired, `python scripts/restoration.py`. What is degraded is the scene after one round trip through the codec, so that
methods on latents can reach it; what a second round trip leaves, the ceiling, bounds every row. The data are pictures of 256
levels, with noise of deviation 0.05 (of values in -1..1) under the blur. PSNR in dB, of the missing half alone under the mask;
right: the grader finds what the caption says; residual: rms of A x - y, values span 2. Steps, kernels and the sizes of steps
are those of `ldm_pipe/restore/defaults.py`, guidance 1, the prompt is the scene's caption unless a row says otherwise. Rows
"in latents" hold the data by a mask of latents and paste the known pixels at the end. Seconds are a picture's, on one thread.
"""


def picture(table: Table, folder: Path) -> str:
    """A column for the truth, the degraded picture, every baseline and every method; four pictures. Returns the file's name."""
    plots, shown = pyplot(), {name: column[:SHOWN] for name, column in table.shown.items()}
    figure, ax = plots.subplots(figsize=(14, 14 * SHOWN / len(shown) + 1.4), layout="constrained")
    columns(ax, shown)
    name = f"restoration_{table.problem.split('(')[0]}.png"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=100)
    plots.close(figure)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=FULL)
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", choices=sorted(registry.KINDS["restoration"]))
    parser.add_argument("--problem", action="append", default=[], choices=list(PROBLEMS))
    parser.add_argument("--anew", action="store_true", help="begin at the first picture")
    parser.add_argument("--steps", type=int, help="of every method, instead of its own")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, started = Pipeline.from_pretrained("builtin", "cpu", "fp32"), time.perf_counter()
    steps = {} if args.steps is None else {"steps": args.steps}
    before = {} if args.anew or args.only or steps else kept(args.output, "restoration")
    tables = [Table(pipe, p, attempts(p, args.only), steps, before.get(p, {})) for p in args.problem or PROBLEMS]
    for k in range(min(table.pictures for table in tables), args.pictures):
        for table in tables:
            if k == table.pictures:
                table.grow(k)
        report(tables, args.output)
        print(f"{k + 1} of {args.pictures} after {(time.perf_counter() - started) / 60:.0f} min", flush=True)


def report(tables: list[Table], folder: Path) -> None:
    """The results so far: a run goes on where it was stopped, and what others found of other problems stays."""
    found = kept(folder, "restoration")
    for table in tables:
        ceiling, right = (float(column) for column in np.mean(table.about, axis=0))
        file = picture(table, folder) if table.whole else found[table.problem]["picture"]
        about = {"pictures": table.pictures, "ceiling": ceiling, "right": right, "picture": file}
        each = {"about": table.about, "each": {n: [[*r.values()] for r in rows] for n, rows in table.rows.items()}}
        found[table.problem] = {**about, "rows": table.means(), "refused": table.refused, **each}
    write(folder, "restoration", found, NOTE + "".join(markdown(p, found[p]) for p in PROBLEMS if p in found))


if __name__ == "__main__":
    main()
