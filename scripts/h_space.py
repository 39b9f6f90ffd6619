"""A direction in h-space, from a blue ground to a red one, and what it does. Into docs/results/h_space.md, .json and .png.

    python scripts/h_space.py       # half a minute on one thread

The direction is the mean difference of a layer's features, step by step, of 24 objects drawn on red and on blue from the same
noise. It is added to 24 other objects on blue; a random direction of the same length stands beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import Pipeline, files, image
from ldm_pipe.analysis.h_space import HSpace, Watching, difference
from ldm_pipe.patch import Patch
from ldm_pipe.plan import patched
from train.world import objects
from train.world.nearest import nearest
from train.world.scenes import article

FROM, TO = "blue", "red"


def drawn(pipe: Pipeline, names: list[str], colour: str, patch: Patch) -> list[Any]:
    """Images of objects on a ground under a patch, as one batch; image k has seed k."""
    prompts = [f"{article(name)} on {article(colour)} background" for name in names]
    whole = pipe.plan(prompts, seeds=tuple(range(len(names))), batch_size=len(names))
    return next(pipe.run(patched(whole, pipe.bundle.model, [patch]))).images


def direction(pipe: Pipeline, folder: Path, layer: str, count: int) -> dict[str, Any]:
    """What the direction from one ground to another does to objects it was not made of: rows by its scale, and a picture."""
    names = [objects()[i] for i in np.random.default_rng(2210).choice(len(objects()), 2 * count, replace=False)]
    groups = []
    for colour in (TO, FROM):
        kept: list[Tensor] = []
        drawn(pipe, names[:count], colour, Watching(kept, layer=layer))
        groups.append(torch.stack(kept, 1))  # [B,steps,C,h,w]
    way, rows, sheet = difference(*groups), dict[str, Any](), []
    other = torch.randn(way.shape, generator=torch.Generator().manual_seed(0))
    other *= way.flatten(1).norm(dim=1)[:, None, None, None] / other.flatten(1).norm(dim=1)[:, None, None, None]
    for name, toward, scale in [(f"{s:g}", way, s) for s in (0.0, 1.0, 2.0, 4.0)] + [("2, random", other, 2.0)]:
        pictures = drawn(pipe, names[count:], FROM, HSpace(toward, scale, layer=layer))
        seen = [nearest(np.asarray(i), 1) for i in pictures]
        same = sum(bool(r.found) and r.found[0].name == n for r, n in zip(seen, names[count:], strict=True))
        rows[name] = {c: 100 * sum(r.colour == c for r in seen) / count for c in (FROM, TO)} | {"object": 100 * same / count}
        sheet.append(pictures[:8])
    out = io.BytesIO()
    image.grid([i for row in sheet for i in row], 8).save(out, "PNG")
    files.write(folder / "h_space.png", out.getvalue(), replace=True)
    return rows


def table(rows: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# A direction in h-space", "", f"From {FROM} to {TO}, at some scale; h_space.png has a row for each.", ""]
    lines += [f"| scale | {FROM}, % | {TO}, % | the object is still the nearest, % |", "|---|---|---|---|"]
    lines += [f"| {n} | {r[FROM]:.0f} | {r[TO]:.0f} | {r['object']:.0f} |" for n, r in rows.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--layer", default="up_blocks.1", help="mid_block is the paper's; the built-in model hardly looks there")
    p.add_argument("--objects", type=int, default=24)
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    rows = direction(Pipeline.from_pretrained("builtin"), args.output, args.layer, args.objects)
    files.write(args.output / "h_space.json", (json.dumps(rows, indent=1) + "\n").encode(), replace=True)
    files.write(args.output / "h_space.md", table(rows).encode(), replace=True)
    print(table(rows))


if __name__ == "__main__":
    main()
