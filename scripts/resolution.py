"""Images at twice the size of training: what repeats, and with which patch. Into docs/results/resolution.md, .json and .png.

    python scripts/resolution.py                     # about 15 minutes on one free core
    python scripts/resolution.py --only seams        # half a minute

Repetition: prompts of one object at 128x128, the same seeds in every row; the grader reads the picture at half its size, and
more than one thing in it is a repetition. Seams: PSNR of tiled decoding against decoding at once. The files are written after
every row; a run that is begun again keeps the rows of as many prompts and steps.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring

from ldm_pipe import Pipeline, UsageError, files, image, memory
from ldm_pipe.doors.hires import Hires
from ldm_pipe.doors.patches import Patches
from train.world.grader import grade, read
from train.world.nearest import resembles
from train.world.scenes import SIZE, captions

ROWS: dict[str, tuple[str, ...]] = {
    "size of training": (), "no patch": (), "attention_scale": ("attention_scale",), "hidiffusion": ("hidiffusion",),
    "hidiffusion, the paper's for SDXL": ("hidiffusion(second=0.16, instead=true)",), "scalecrafter": ("scalecrafter",),
    "scalecrafter, dispersed": ("scalecrafter(dispersed=0.6)",),
    "scalecrafter and attention_scale": ("scalecrafter", "attention_scale"), "tiles": ("tiles",), "--hires 2x": (),
}  # fmt: skip
SHOWN = 8  # images of a row in the picture


def repetition(rows: dict[str, Any], count: int, steps: int, sheet: Path, save: Callable[[], None]) -> None:
    """Fill a row for every patch, and one at the size of training; a picture of the first eight images of each."""
    pipe, wanted = Pipeline.from_pretrained("builtin", "cpu"), measuring.scenes("one", "train", count, 128)
    prompts, strips = [captions(s)[0] for s in wanted], _strips(rows, sheet)
    for name, texts in ROWS.items():
        if rows.get(name, {}).get("asked") == [count, steps] and (name in strips or "refused" in rows[name]):
            continue
        began, side = time.process_time(), SIZE if name in ("size of training", "--hires 2x") else 2 * SIZE
        whole = pipe.plan(prompts, seeds=tuple(range(count)), steps=steps, height=side, width=side, batch_size=20)
        try:
            whole = Patches(texts).applied(pipe, whole)
            whole = Hires(2.0).applied(pipe, whole, lambda plan: plan) if name == "--hires 2x" else whole
            made = [i for out in pipe.run(whole) for i in out.images]
        except UsageError as error:
            rows[name] = {"refused": str(error), "asked": [count, steps]}
            save()
            continue
        took = (time.process_time() - began) / count
        halves = [np.asarray(i.resize((SIZE, SIZE), Resampling.BOX)) for i in made]
        found = np.array([len(read(half).found) for half in halves])
        near = sum(resembles(h, s) for h, s in zip(halves, wanted, strict=True))
        rows[name] = {
            "things": float(found.mean()),
            "repeated": measuring.share(int((found > 1).sum()), count),
            "right": measuring.share(sum(grade(h, s) for h, s in zip(halves, wanted, strict=True)), count),
            "nearest": 100 * near / count,
            "seconds": took,
            "asked": [count, steps],
        }
        print(name, rows[name], flush=True)
        strips[name] = image.grid([i.resize((2 * SIZE, 2 * SIZE)) for i in made[:SHOWN]], SHOWN)
        there, out = [strips[n] for n in ROWS if n in strips], io.BytesIO()
        rows["shown"] = [n for n in ROWS if n in strips]
        whole_sheet = Image.new("RGB", (there[0].width, sum(s.height for s in there)))
        for place, strip in enumerate(there):
            whole_sheet.paste(strip, (0, place * strip.height))
        whole_sheet.save(out, "PNG")
        files.write(sheet, out.getvalue(), replace=True)
        save()


def _strips(rows: dict[str, Any], sheet: Path) -> dict[str, Any]:
    """The rows of the picture that stands there, by name."""
    names = rows.get("shown", [])
    if not names or not sheet.exists():
        return {}
    picture = Image.open(sheet).convert("RGB")
    height = picture.height // len(names)
    return {n: picture.crop((0, k * height, picture.width, (k + 1) * height)) for k, n in enumerate(names)}


@torch.no_grad()
def seams(count: int = 20) -> dict[str, float]:
    """PSNR in dB of images decoded in tiles of so many latent pixels against those decoded at once, 256x256 pixels."""
    pipe = Pipeline.from_pretrained("builtin", "cpu")
    side = 4 * SIZE // pipe.bundle.codec.factor
    whole = pipe.plan("a fox on a blue background", seed=0, num_images=count, steps=8)
    latents = torch.cat([out.latents for out in pipe.run(whole)])
    latents = latents.repeat(1, 1, side // latents.shape[2], side // latents.shape[3])
    at_once, found = pipe.decode(latents), dict[str, float]()
    for tile in (8, 16, 32):
        error = (memory.tiled(pipe.bundle.codec, latents, tile) - at_once).double().square().mean((1, 2, 3))
        found[str(tile)] = float((10 * torch.log10(4 / error)).mean())
    return found


def table(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# At twice the size of training", ""]
    if rows := found.get("repetition"):
        columns = ("", "things found (1 is right)", "more than one, %", "right, %", "the nearest is right, %", "s an image")
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, r in ((n, rows[n]) for n in ROWS if n in rows):
            if "refused" in r:
                lines.append(f"| {name} | refused: {r['refused']} |||||")
                continue
            shares = " | ".join(f"{r[k]['right']:.0f} ({r[k]['low']:.0f} to {r[k]['high']:.0f})" for k in ("repeated", "right"))
            lines.append(f"| {name} | {r['things']:.2f} | {shares} | {r['nearest']:.0f} | {r['seconds']:.2f} |")
    if s := found.get("seams"):
        values = ", ".join(f"{n}: {v:.1f}" for n, v in s.items())
        lines += [
            "",
            f"**Tiled decoding** against decoding at once, PSNR in dB by the side of a tile in latent pixels: {values}.",
        ]
    return "\n".join([*lines, ""])


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--prompts", type=int, default=24)
    p.add_argument("--steps", type=int, default=15, help="at twice the size")
    p.add_argument("--only", choices=("repetition", "seams"))
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    torch.set_num_threads(1)
    found = measuring.kept(args.output, "resolution")

    def save() -> None:
        measuring.write(args.output, "resolution", found, table(found))

    if args.only != "repetition":
        found["seams"] = seams()
        save()
    if args.only != "seams":
        repetition(found.setdefault("repetition", {}), args.prompts, args.steps, args.output / "resolution.png", save)


if __name__ == "__main__":
    main()
