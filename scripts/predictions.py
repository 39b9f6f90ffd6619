"""Train noise, velocity and flow from nothing on the same pictures of the built-in world, and compare what they draw.

python scripts/predictions.py                     # predictions.{json,md,png} into docs/results/; 25 minutes of one core a row
python scripts/predictions.py --only v --steps 200 --prompts 20 --output /tmp/look

Same network, same fresh weights, same pictures in the same order, same optimiser; what differs is the path, what the network
says of it, and the levels that are visited. A small network and scenes of one object, so that each row takes minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import ROOT, graded, kept, scenes, share, write
from PIL import Image

from ldm_pipe import Pipeline, files, image, recipe
from train import recipe as recipes
from train.loop import run
from train.world import render
from train.world.nearest import resembles
from train.world.scenes import captions, scene_at

PICTURES, SHOWN = 6000, 12
NETWORK = {"channels": [64, 128, 192], "layers": [0, 1, 1], "attention": [False, True, True], "heads": 4}
# Name of the row -> what it sets in [network], and the levels it is trained at.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "eps": ({"schedule": "scaled_linear", "prediction": "eps"}, {"name": "uniform"}),
    "v": ({"schedule": "scaled_linear", "prediction": "v"}, {"name": "uniform"}),
    "v, no signal at the end": ({"schedule": "scaled_linear", "prediction": "v", "zero_terminal": True}, {"name": "uniform"}),
    "flow": ({"schedule": "flow", "prediction": "flow"}, {"name": "uniform"}),
    "flow, levels of the built-in model": (
        {"schedule": "flow", "prediction": "flow"},
        {"name": "logit_normal", "mean": 1.0, "deviation": 1.2},
    ),
}


def pictures(folder: Path) -> None:
    """Scenes of one object with a caption each, as files."""
    if not folder.exists():
        with files.new_folder(folder) as temp:
            made = index = 0
            while made < PICTURES:
                scene, words = scene_at(7, index)
                index += 1
                if scene.kind == "one":
                    Image.fromarray(render(scene)).save(temp / f"{made:05}.png")
                    (temp / f"{made:05}.txt").write_text(words)
                    made += 1


def folder_of(place: Path, name: str, steps: int) -> Path:
    """Where a row is trained."""
    return place / f"{name}-{steps}".replace(",", "").replace(" ", "_")


def trained(name: str, place: Path, steps: int) -> Path:
    """The export of a row."""
    network, levels = ROWS[name]
    tables = recipes.read(str(ROOT / "configs" / "scratch.toml"))
    tables["network"] |= NETWORK | network
    tables["data"] |= {"path": str(place / "data"), "cache": str(place / "cache")}
    tables["objective"] |= {"levels": levels}
    tables["job"] |= {"output": str(folder_of(place, name, steps)), "steps": steps, "batch": 64}
    tables["job"] |= {"lr": 1.5e-3, "lr_end": 1e-5, "warmup": 100, "ema": 0.995, "precision": "bf16"}
    return run(*recipes.build(tables, name))


def measured(export: Path, count: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """Accuracy on fresh scenes, image i of seed i, with the sampler that the export names; and the first pictures."""
    pipe, wanted = Pipeline.from_pretrained(str(export)), scenes("one", "train", count, 12)
    out = pipe([captions(s)[0] for s in wanted], seeds=tuple(range(count)), batch_size=25, steps=25, guidance_scale=2.0)
    near = sum(resembles(np.asarray(i), s) for i, s in zip(out.images, wanted, strict=True))
    return {"grader": share(graded(out.images, wanted), count), "nearest": share(near, count)}, list(out.images[:SHOWN])


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = "| | right by the grader, % | nearest sprite and colour, % | steps | minutes |"
    lines = [str(__doc__).split("\n\n")[2].strip(), "", head, "|---|---|---|---|---|"]
    for name, row in ((n, found[n]) for n in ROWS if n in found):
        cells = ["{right:.0f} ({low:.0f} to {high:.0f})".format(**row[k]) for k in ("grader", "nearest")]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['steps']} | {row['minutes']:.0f} |")
    prompts = next(iter(found.values()))["grader"]["prompts"]
    last = f"{prompts} prompts a row, 25 steps, guidance 2, each with its own sampler; one thread of a busy machine, bf16."
    return "\n".join(["# What the network predicts", "", *lines, "", last, "", "![rows as in the table](predictions.png)", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    place = ROOT / "runs" / "predictions"
    pictures(place / "data")
    for name in args.only or ROWS:
        begun = time.perf_counter()
        export = trained(name, place, args.steps)
        minutes = (time.perf_counter() - begun) / 60
        row, shown = measured(export, args.prompts)
        found = kept(args.output, "predictions") | {name: {**row, "steps": args.steps, "minutes": minutes}}
        image.grid(shown, SHOWN).save(export / "shown.png")
        write(args.output, "predictions", found, table(found))
        print(name, found[name], flush=True)
        exports = [folder_of(place, n, found[n]["steps"]) / "export" for n in ROWS if n in found]
        strips = [Image.open(e / "shown.png") for e in exports if (e / "shown.png").exists()]
        files.write(args.output / "predictions.png", recipe.encode(image.grid(strips, 1), None), replace=True)


if __name__ == "__main__":
    main()
