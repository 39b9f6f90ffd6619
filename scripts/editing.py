"""Measure editing on the built-in model: change the object, or the background's colour, in generated and in real pictures.

    python scripts/editing.py                                          # everything, into docs/results/editing.{json,md,png}
    python scripts/editing.py --pictures 20 --only null_text           # one row of the table anew; the others stay
    python scripts/editing.py --source real --skip null_text --skip fixed_point
    python scripts/editing.py --sheet                                  # only editing.png

The grader says whether an edit shows what its prompt says; what was kept is the root mean square by which pixels that had no
reason to change did: outside the object's box where the object changes, inside the object where its background does. Generated
pictures are those that the grader reads right; real ones are renders of the training world that went through the codec.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import columns, graded, pyplot, share, write
from measuring import kept as kept_results
from PIL import Image

from ldm_pipe import Pipeline, image, registry
from ldm_pipe.doors.edit import INVERSION, Edit
from train.world import draw_scene, render
from train.world.edits import KINDS, changed, kept
from train.world.grader import holds, read
from train.world.scenes import Scene, captions

PICTURES, SHOWN = 100, 4  # in every cell, and of each kind on the sheet
SOURCES = ("generated", "real")
Row = Callable[[Pipeline, "Case"], Image.Image]


@dataclass(frozen=True, eq=False)
class Case:
    """A picture to edit. prompts: of it and of its edit. kept: [64,64], True where nothing has a reason to change."""

    picture: Image.Image
    prompts: tuple[str, str]
    wanted: Scene
    kept: np.ndarray
    seed: int


def edited(inversion: str | None, method: str = "prompt_to_prompt", masked: bool = False, **fields: Any) -> Row:
    """An editing method from the picture's inversion (None: beside its own walk); masked: only where there is a reason."""

    def row(pipe: Pipeline, c: Case) -> Image.Image:
        if inversion is None:
            return Edit(*c.prompts, method, fields)(pipe, seed=c.seed).images[1]
        mask = Image.fromarray(~c.kept) if masked else None
        return Edit(*c.prompts, method, fields, inversion)(pipe, c.picture, mask, seed=c.seed).images[1]

    return row


def rows(source: str) -> dict[str, Row]:
    """The table's rows for generated or real pictures: baselines, every registered inversion, editing methods."""
    by, how = (None, "same seed") if source == "generated" else (INVERSION, "inverted")
    found: dict[str, Row] = {
        "no edit": lambda pipe, c: c.picture,
        "fresh sample": lambda pipe, c: pipe(c.prompts[1], seed=c.seed).images[0],
        "sdedit": lambda pipe, c: pipe(c.prompts[1], seed=c.seed, init_image=c.picture, strength=0.6).images[0],
        **{name: edited(name) for name in registry.KINDS["inversion"]},
        **({"prompt to prompt, same seed": edited(None)} if by is None else {}),  # inverted, it is one of the inversions
        f"local blend, {how}": edited(by, blend="true"),
        f"plug and play, {how}": edited(by, "plug_and_play"),
    }
    masked = {f"{name}, masked": edited(INVERSION, name, True) for name in ("prompt_to_prompt", "shape_guided")}
    return found if source == "generated" else found | masked


def cases(pipe: Pipeline, source: str, kind: str, count: int) -> list[Case]:
    """`count` pictures of one object, what each is to become, and what of it is to stay."""
    rng, made, seed = np.random.default_rng([42, source == "real", kind == "object"]), list[Case](), 0
    while len(made) < count:
        scene, seed = draw_scene(rng, "one", "train"), seed + 1
        if source == "real":
            through = pipe.decode(pipe.bundle.codec.encode(image.to_tensor([Image.fromarray(render(scene))])))
            picture = image.to_pil(through)[0]
        else:
            picture = pipe(captions(scene)[0], seed=seed).images[0]
        there = read(np.asarray(picture))
        if holds(there, scene):
            wanted = changed(scene, kind, rng)
            made.append(Case(picture, (captions(scene)[0], captions(wanted)[0]), wanted, kept(there.found[0], kind), seed))
    return made


def measured(images: list[Image.Image], given: list[Case]) -> dict[str, float]:
    """A cell of the table: edits that are right, in percent with their interval, and how far the rest moved, of 255 levels."""
    gaps = [(np.asarray(i, dtype=float) - np.asarray(c.picture))[c.kept] for i, c in zip(images, given, strict=True)]
    moved = float(np.mean([np.sqrt(np.square(g).mean()) for g in gaps if g.size]))
    return {**share(graded(images, [c.wanted for c in given]), len(given)), "moved": moved}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, a table for every kind of picture."""
    text = f"# Editing, measured\n\n{str(__doc__).split(chr(10) * 2)[2]}"
    for source in SOURCES:
        cells = [found.get(f"{source} {kind}", {}) for kind in KINDS]
        text += f"\n| {source} pictures | object: right | outside moved | background: right | object moved |\n{'|---' * 5}|\n"
        for name in (name for name in rows(source) if any(name in cell for cell in cells)):
            text += f"| {name.replace('_', ' ')} | " + " | ".join(entry(cell.get(name)) for cell in cells) + " |\n"
    notes = f"Right: percent of {PICTURES}, with its 95% interval. Moved: levels of 255. Made by `python scripts/editing.py`."
    return f"{text}\n{notes}\n\n![pictures, and their edits in every row's way](editing.png)\n"


def entry(v: dict[str, float] | None) -> str:
    """Two columns of a row."""
    if not v:
        return "- | -"
    of = "" if v["prompts"] == PICTURES else f", of {v['prompts']}"
    return f"{v['right']:.0f} ({v['low']:.0f} to {v['high']:.0f}{of}) | {v['moved']:.1f}"


def cell(pipe: Pipeline, source: str, kind: str, count: int, chosen: list[str], folder: Path) -> None:
    """Measure rows for one kind of pictures and edits; each row is on disk as soon as it is measured."""
    given = cases(pipe, source, kind, count)
    for name, row in rows(source).items():
        if name in chosen:
            started, images = time.time(), [row(pipe, c) for c in given]
            found = kept_results(folder, "editing")
            found.setdefault(f"{source} {kind}", {})[name] = result = measured(images, given)
            write(folder, "editing", found, table(found))
            print(f"{source} {kind}, {name}: {entry(result)} ({time.time() - started:.1f} s)", flush=True)


def sheet(pipe: Pipeline, folder: Path) -> None:
    """A few pictures of every kind, each with all the edits that the table has."""
    plots, found = pyplot(), kept_results(folder, "editing")
    figure, axes = plots.subplots(len(SOURCES) * len(KINDS), figsize=(11, 22), layout="constrained")
    for ax, (source, kind) in zip(axes, ((s, k) for s in SOURCES for k in KINDS), strict=True):
        given = cases(pipe, source, kind, SHOWN)
        shown = {"picture": [c.picture for c in given]}
        for name, row in rows(source).items():
            if name != "no edit" and name in found.get(f"{source} {kind}", {}):
                shown[name.replace("_", " ")] = [row(pipe, c) for c in given]
        columns(ax, shown)
        ax.set_ylabel(f"{source}, {kind} edited")
        print(f"{source} {kind}: " + "; ".join(c.prompts[1] for c in given), flush=True)
    figure.savefig(folder / "editing.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="in every cell")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="a row, such as null_text")
    parser.add_argument("--skip", action="append", default=[], metavar="ROW")
    parser.add_argument("--source", action="append", default=[], choices=SOURCES)
    parser.add_argument("--sheet", action="store_true", help="only the sheet of pictures")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    pipe, begun = Pipeline.from_pretrained(), time.time()
    if not args.sheet:
        for source, kind in ((s, k) for s in args.source or SOURCES for k in KINDS):
            chosen = [name for name in rows(source) if name not in args.skip and (not args.only or name in args.only)]
            cell(pipe, source, kind, args.pictures, chosen, args.output)
    if args.sheet or not (args.only or args.skip or args.source):
        sheet(pipe, args.output)
    print(f"{(time.time() - begun) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
