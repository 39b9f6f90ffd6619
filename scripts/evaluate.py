"""Measure the built-in model: accuracy by the grader with 95% intervals, codec, guidance plot, a sheet of samples.

python scripts/evaluate.py                      # everything, into docs/results/ (about 20 minutes on 2 cores)
python scripts/evaluate.py --prompts 50 --only accuracy
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import graded, pyplot, scenes, share, write

from ldm_pipe import Pipeline, files, image, recipe
from train.world import draw_scene, render
from train.world.grader import grade, holds, read
from train.world.nearest import resembles
from train.world.scenes import OPPOSITE, Scene, captions

CATEGORIES = {
    "one object": ("one", "train"),
    "two objects": ("two", "train"),
    "two or three of a kind": ("count", "train"),
    "one object, held-out colour": ("one", "colour"),
    "two objects, held-out pair": ("two", "pair"),
    "two objects, held-out colour": ("two", "colour"),
    "two or three of a kind, held-out colour": ("count", "colour"),
}
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def accuracy(pipe: Pipeline, wanted: list[Scene], settings: dict[str, Any]) -> dict[str, float]:
    """How many images say what their prompts say, by the grader and by the nearest sprites; of two objects also how many say
    the opposite relation. Image i has seed i."""
    seeds = tuple(range(len(wanted)))
    right = near = swapped = 0
    for first in range(0, len(wanted), 50):
        part = wanted[first : first + 50]
        out = pipe([captions(s)[0] for s in part], seeds=seeds[first : first + 50], batch_size=50, **settings)
        readings = [read(np.asarray(i)) for i in out.images]
        right += sum(map(holds, readings, part))
        opposite = [replace(s, relation=OPPOSITE[s.relation]) for s in part if s.relation]  # all of them, or none
        swapped += sum(map(holds, readings, opposite))
        near += sum(resembles(np.asarray(i), s) for i, s in zip(out.images, part, strict=True))
    return {**share(right, len(wanted)), "nearest": 100 * near / len(wanted), "swapped": 100 * swapped / len(wanted)}


def codec(pipe: Pipeline, count: int) -> dict[str, Any]:
    """PSNR of fresh scenes through the codec in dB, and the grader on renders and on reconstructions."""
    psnr, plain, back = [], 0, 0
    for kind in ("one", "two", "count"):
        wanted = scenes(kind, "any", count, 77)
        renders = np.stack([render(s) for s in wanted])
        x = torch.from_numpy(renders).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            y = torch.cat([pipe.decode(pipe.bundle.codec.encode(part)) for part in x.split(50)])
        pictures = [np.asarray(i) for i in image.to_pil(y)]
        error = np.square(renders.astype(float) - np.stack(pictures)).mean((1, 2, 3))
        psnr += list(10 * np.log10(255**2 / error))
        plain, back = plain + graded(renders, wanted), back + graded(pictures, wanted)
    return {
        "psnr": float(np.mean(psnr)),
        "psnr_deviation": float(np.std(psnr)),
        "grader_on_renders": share(plain, 3 * count),
        "grader_after_codec": share(back, 3 * count),
    }


def guidance(pipe: Pipeline, count: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Accuracy against guidance scale, as rows and as a plot."""
    rows: dict[str, Any] = {}
    for name in list(CATEGORIES)[:3]:
        wanted = scenes(*CATEGORIES[name], count, 55)
        rows[name] = {s: accuracy(pipe, wanted, {**settings, "guidance_scale": s}) for s in SCALES}
        print(name, {s: round(r["right"], 1) for s, r in rows[name].items()}, flush=True)
    figure, axes = pyplot().subplots(figsize=(5, 3), layout="constrained")
    for name, row in rows.items():
        middle, low, high = (np.array([r[k] for r in row.values()]) for k in ("right", "low", "high"))
        axes.errorbar(SCALES, middle, yerr=[middle - low, high - middle], marker="o", capsize=3, label=name)
    axes.set(xlabel="guidance scale", ylabel="right, %", ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "guidance.png", dpi=110)
    return rows


def sheet(pipe: Pipeline, folder: Path) -> None:
    """64 unselected samples: the first scenes of a stream, seeds 0 to 63, prompts beside them in a text file."""
    rng = np.random.default_rng(2026)
    wanted = [draw_scene(rng, kind, "any") for kind in ("one", "two", "count", "two") * 16]
    out = pipe([captions(s)[0] for s in wanted], seeds=tuple(range(64)), batch_size=32)
    files.write(folder / "samples.png", recipe.encode(image.grid(out.images, 8).resize((8 * 98, 8 * 98)), None), replace=True)
    verdicts = ["" if grade(np.asarray(i), s) else "  (graded wrong)" for i, s in zip(out.images, wanted, strict=True)]
    lines = [f"{k + 1:2} {p}{v}" for k, (p, v) in enumerate(zip(out.prompts, verdicts, strict=True))]
    files.write(folder / "samples.txt", ("\n".join(lines) + "\n").encode(), replace=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--prompts", type=int, default=500, help="per category")
    parser.add_argument("--category", action="append", default=[], choices=list(CATEGORIES), help="with --only accuracy")
    parser.add_argument("--only", choices=["accuracy", "codec", "guidance", "sheet"])
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="steps=25, guidance_scale=3.0, sampler=euler")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    values = dict(item.split("=") for item in args.set)
    kinds: dict[str, Any] = {"steps": int, "guidance_scale": float}
    settings = {k: kinds.get(k, str)(v) for k, v in values.items()}
    pipe = Pipeline.from_pretrained(args.model)
    path = args.output / "builtin.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    started = time.perf_counter()
    if args.only in (None, "codec"):
        found["codec"] = codec(pipe, args.prompts // 3)
        print(found["codec"], flush=True)
    if args.only in (None, "accuracy"):
        for name, (kind, split) in ((n, c) for n, c in CATEGORIES.items() if n in (args.category or CATEGORIES)):
            row = accuracy(pipe, scenes(kind, split, args.prompts, 11), settings)
            found.setdefault("accuracy", {})[name] = row
            interval = f"{row['right']:.1f}% ({row['low']:.0f} to {row['high']:.0f})"
            print(f"| {name} | {interval} | {row['nearest']:.0f}% | {row['swapped']:.0f}% |", flush=True)
    if args.only in (None, "guidance"):
        found["guidance"] = guidance(pipe, max(20, args.prompts // 5), settings, args.output)
    if args.only in (None, "sheet"):
        sheet(pipe, args.output)
    write(args.output, path.stem, found)
    print(f"written to {args.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
