"""Measure editing on the built-in model: change the object, or the background's colour, in generated and in real pictures.

    python scripts/editing.py                                     # everything, into docs/results/editing.{json,md,png}
    python scripts/editing.py --pictures 20 --only null_text      # one row of the table anew

The grader says whether an edit shows what its prompt says; what was kept is the root mean square by which pixels that had no
reason to change did: outside the object's box where the object changes, inside the object where its background does. Generated
pictures are those that the grader reads right; real ones are renders of the training world that went through the codec.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import binary_erosion

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import Pipeline, files, image, recipe, registry
from ldm_pipe.analysis.interval import wilson
from ldm_pipe.edit import Edit
from train.world import draw_scene, render
from train.world.grader import grade, holds, read
from train.world.scenes import COLOURS, SIZE, Scene, captions, colour_heldout
from train.world.sprites import objects, sprite

MARGIN = 3  # pixels around the object's box that a new object may also take
SHOWN = 4  # pictures of each kind on the sheet


@dataclass(frozen=True, eq=False)
class Case:
    """A picture to edit. kept: [64,64], True where nothing has a reason to change. real: a render, not the model's own."""

    picture: Image.Image
    scene: Scene
    wanted: Scene
    kept: np.ndarray
    seed: int
    real: bool

    @property
    def prompts(self) -> tuple[str, str]:
        """(of the picture, of the edit)."""
        return captions(self.scene)[0], captions(self.wanted)[0]


Row = Callable[[Pipeline, Case], Image.Image]


def inverted(name: str, method: str = "prompt_to_prompt") -> Row:
    """The picture's inversion, then an editing method."""
    return lambda pipe, c: Edit(*c.prompts, method=method, inversion=name)(pipe, c.picture, seed=c.seed).images[1]


def side_by_side(method: str) -> Row:
    """An editing method beside the generated picture's own walk."""
    return lambda pipe, c: Edit(*c.prompts, method=method)(pipe, seed=c.seed).images[1]


def rows(real: bool) -> dict[str, Row]:
    """The table's rows. Every registered method and inversion makes one."""
    found: dict[str, Row] = {
        "no edit": lambda pipe, c: c.picture,
        "fresh sample": lambda pipe, c: pipe(c.prompts[1], seed=c.seed).images[0],
        "sdedit": lambda pipe, c: pipe(c.prompts[1], seed=c.seed, init_image=c.picture, strength=0.6).images[0],
    }
    found |= {name: inverted(name) for name in registry.KINDS["inversion"]}
    for name in registry.KINDS["editing"]:
        if not real:
            found[f"{name}, same seed"] = side_by_side(name)
        elif name != "prompt_to_prompt":
            found[f"{name}, inverted"] = inverted(Edit("", "").inversion, name)
    return found


def cases(pipe: Pipeline, kind: str, real: bool, count: int) -> list[Case]:
    """`count` pictures of one object, what each is to become, and what of it is to stay."""
    rng, made = np.random.default_rng([42, real, kind == "object"]), list[Case]()
    for seed in range(100 * count):
        scene = draw_scene(rng, "one", "train")
        name, colour = scene.names[0], scene.colour
        if real:
            through = pipe.decode(pipe.bundle.codec.encode(image.to_tensor([Image.fromarray(render(scene))])))
            picture = image.to_pil(through)[0]
        else:
            picture = pipe(captions(scene)[0], seed=seed).images[0]
        there = read(np.asarray(picture))
        if holds(there, scene):
            names = [n for n in objects() if n != name and not colour_heldout(n, colour)]
            colours = [c for c in COLOURS if c != colour and not colour_heldout(name, c)]
            placed = replace(scene.placed[0], name=str(rng.choice(names)))
            objected = kind == "object"
            wanted = replace(scene, placed=(placed,)) if objected else replace(scene, colour=str(rng.choice(colours)))
            made.append(Case(picture, scene, wanted, _kept(there.found[0], objected), seed, real))
        if len(made) == count:
            break
    return made


def _kept(found: Any, objected: bool) -> np.ndarray:
    """[64,64]: all but the object's box, or the object without its edge."""
    alpha = sprite(found.name, round(found.size))[..., 3]
    (h, w), grow = alpha.shape, MARGIN if objected else 0
    top, left = round(found.y - h / 2), round(found.x - w / 2)
    rows_, columns = np.mgrid[:SIZE, :SIZE]
    inside = (rows_ >= top - grow) & (rows_ < top + h + grow) & (columns >= left - grow) & (columns < left + w + grow)
    if objected:
        return ~inside
    solid = np.zeros((SIZE, SIZE), dtype=bool)
    solid[inside] = (alpha > 0.99)[rows_[inside] - top, columns[inside] - left]
    return np.asarray(binary_erosion(solid, iterations=2))


def measured(images: list[Image.Image], given: list[Case]) -> dict[str, float]:
    """A cell of the table: edits that are right, in percent with their interval, and how far the rest moved, of 255 levels."""
    right = sum(grade(np.asarray(i), c.wanted) for i, c in zip(images, given, strict=True))
    gaps = [(np.asarray(i, dtype=float) - np.asarray(c.picture, dtype=float))[c.kept] for i, c in zip(images, given, strict=True)]
    low, high = wilson(right, len(given))
    moved = np.mean([np.sqrt(np.square(g).mean()) if g.size else 0.0 for g in gaps])
    return {"right": 100 * right / len(given), "low": 100 * low, "high": 100 * high, "moved": float(moved), "pictures": len(given)}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, a table for every kind of picture."""
    text = "# Editing, measured\n\n" + " ".join((__doc__ or "").split("\n\n")[2].split()) + " Made by `scripts/editing.py`.\n"
    for source in ("generated", "real"):
        cells = [found.get(f"{source} {kind}", {}) for kind in ("object", "background")]
        names = dict.fromkeys(name for cell in cells for name in cell)
        text += f"\n## {source.capitalize()} pictures\n\n| method | object: right | outside moved | background: right | object moved |"
        text += "\n|---|---|---|---|---|\n"
        for name in names:
            text += f"| {name.replace('_', ' ')} | " + " | ".join(_cell(cell.get(name)) for cell in cells) + " |\n"
    return text + "\nRight in percent with its 95% interval; moved in levels of 255. `editing.png`: the first pictures and their edits.\n"


def _cell(v: dict[str, float] | None) -> str:
    return f"{v['right']:.0f} ({v['low']:.0f} to {v['high']:.0f}) | {v['moved']:.1f}" if v else "- | -"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--pictures", type=int, default=100, help="in every cell")
    parser.add_argument("--only", help="a row, such as null_text; the others stay as they are in editing.json")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    pipe, path, strips = Pipeline.from_pretrained(args.model), args.output / "editing.json", list[list[Image.Image]]()
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for real, kind in ((r, k) for r in (False, True) for k in ("object", "background")):
        given = cases(pipe, kind, real, args.pictures)
        strip = [[c.picture] for c in given[:SHOWN]]
        cell = found.setdefault(f"{'real' if real else 'generated'} {kind}", {})
        for name, row in rows(real).items():
            if args.only in (None, name):
                started = time.perf_counter()
                images = [row(pipe, c) for c in given]
                cell[name] = measured(images, given)
                strip = [[*s, i] for s, i in zip(strip, images, strict=False)]
                each = (time.perf_counter() - started) / len(given)
                print(f"{'real' if real else 'generated'} {kind}, {name}: {_cell(cell[name])} ({each:.1f} s a picture)", flush=True)
        strips += strip
        files.write(path, (json.dumps(found, indent=1) + "\n").encode(), replace=True)
        files.write(args.output / "editing.md", table(found).encode(), replace=True)
    if args.only is None:
        wide = max(len(s) for s in strips)
        blank = Image.new("RGB", (SIZE, SIZE), "white")
        sheet = image.grid([i for s in strips for i in (*s, *[blank] * (wide - len(s)))], wide)
        files.write(args.output / "editing.png", recipe.encode(sheet, None), replace=True)


if __name__ == "__main__":
    main()
