"""Teach the built-in model something new, and measure what it learned and what it lost. Written to docs/results/.

python scripts/finetune_builtin.py --job lora_style           # a few minutes each; --job again for several
python scripts/finetune_builtin.py --job lora_style --set job.lr=1e-3 --set job.steps=200     # a row of the sweep
python scripts/finetune_builtin.py --job lora_style --prompts 4 --output /tmp/look
accelerate launch --cpu --num_processes 2 scripts/finetune_builtin.py --job inpainting        # on two threads
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lessons
import marks
import torch
from accelerate import PartialState
from measuring import ROOT, kept, write
from PIL import Image

from ldm_pipe import Pipeline, adapted, files, image
from train import recipe
from train.loop import run

LEVELS = {"name": "logit_normal", "mean": 1.0, "deviation": 1.2}  # those that the built-in model was trained with
NEW, TOY = lessons.WORDS
PRIOR = {"prior": lessons.old(40), "prior_images": 80}
Rows = dict[str, Callable[[int], marks.Result]]  # what is compared: count of prompts -> result


@dataclass(frozen=True)
class Lesson:
    """What is taught (a recipe of configs/, its tables changed, on pictures that `data` puts into a folder), and what the
    results compare: `rows` of (the export, the plain model)."""

    recipe: str
    data: Callable[[Path], None]
    rows: Callable[[Path, Pipeline], Rows]
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompts: int = 50


def before_after(measure: Callable[[Pipeline, int], marks.Result], lora: str = "", word: str = "") -> Any:
    """The model as it was, and with the files that the lesson made."""

    def rows(export: Path, plain: Pipeline) -> Rows:
        taught = adapted(plain, [f"{export / lora}:1"] if lora else [], [str(export / word)] if word else [])
        return {"before": partial(measure, plain), "after": partial(measure, taught)}

    return rows


def style(export: Path, plain: Pipeline) -> Rows:
    """Beside the pictures of the style themselves."""
    return {"the style itself": partial(marks.style_itself, plain), **before_after(marks.of_style, LOW)(export, plain)}


def steered(export: Path, plain: Pipeline) -> Rows:
    """Without and with the network that reads edges."""
    named = {"without": "", "with its edges": str(export)}
    return {name: partial(marks.of_layout(folder), plain) for name, folder in named.items()}


def restored(operator: str, methods: tuple[str, ...], masked: bool) -> Any:
    """The trained model beside methods that take the built-in one as it is."""

    def rows(export: Path, plain: Pipeline) -> Rows:
        base = marks.mean_fill if masked else marks.bicubic
        found = {base.__name__.replace("_", " "): partial(marks.of_restored(operator, base), plain)}
        for method in methods:
            found[f"{method}, not trained for it"] = partial(
                marks.of_restored(operator, marks.zero_shot(operator, method)), plain
            )
        taught = Pipeline.from_pretrained(str(export), "cpu", "fp32")
        by = marks.concatenated(masked)
        return found | {"trained": partial(marks.of_restored(operator, by), taught)}

    return rows


def both(export: Path, plain: Pipeline) -> Rows:
    """The second subject's export and the first's as one."""
    from train.concepts import concepts

    first, merged = ROOT / "runs" / "builtin_custom_diffusion" / "run" / "export", export.parent / "both.safetensors"
    told = export.parent / "captions.txt"
    told.write_text("\n".join(lessons.scene_at(6060, k)[1] for k in range(300)) + "\n")
    merged.unlink(missing_ok=True)
    given = [f"{folder}={said}" for folder, word in ((first, NEW), (export, TOY)) for said in lessons.told_in_places(word)]
    concepts("builtin", given, str(told), merged, ridge=1e-3)
    words = [str(f / "learned_embeds.safetensors") for f in (first, export)]
    return {
        "before": partial(marks.of_pair, adapted(plain, [], words)),
        "merged": partial(marks.of_pair, adapted(plain, [f"{merged}:1"], words)),
    }


def shown(export: Path, plain: Pipeline) -> Rows:
    """Without a word, before and after it can be shown a picture."""
    taught = Pipeline.from_pretrained(str(export), "cpu", "fp32")
    return {"before": partial(marks.of_variation(False), plain), "shown a picture": partial(marks.of_variation(True), taught)}


def together(export: Path, plain: Pipeline) -> Rows:
    """Both words, trained at once."""
    words = [str(export / WORD), str(export / "learned_embeds_2.safetensors")]
    taught = adapted(plain, [f"{export / KEYS}:1"], words)
    return {"before": partial(marks.of_pair, adapted(plain, [], words)), "together": partial(marks.of_pair, taught)}


def subject(name: str, word: str, lora: str, learned: str, recipe: str, tables: dict[str, dict[str, Any]]) -> Lesson:
    """A lesson of one object under a word: alone where only the word learns, else in several places."""
    data = (lessons.in_places if lora else lessons.subject)(name, word)
    return Lesson(recipe, data, before_after(marks.of_subject(name, word), lora, learned), tables)


FIRST, SECOND = lessons.NAMES
KEYS = "custom_diffusion.safetensors"
LOW, WORD = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
FOUND = {"task": {"word": NEW, "begin": "duck"}, "job": {"steps": 600, "lr": 2e-3, "lr_end": 2e-4, "batch": 8, "ema": 0.95}}
LESSONS = {
    "lora_style": Lesson("lora", lessons.styled, style, {
        "lora": {"rank": 16, "layers": ["*"]},
        "objective": {"levels": {"name": "logit_normal", "mean": 0.0, "deviation": 1.2}},  # a line is drawn late
        "job": {"steps": 800, "lr": 1e-3, "lr_end": 5e-5, "batch": 8, "warmup": 20, "ema": 0.98}}),
    "dreambooth": subject(FIRST, lessons.RARE, LOW, "", "dreambooth", {
        "task": {"instance": f"a {lessons.RARE}", **PRIOR, "train_text": True},
        "lora": {"rank": 16, "layers": ["*attn*.to_?", "*attn*.to_out.0", "*conv?"], "text_layers": ["*self_attn.*_proj"]},
        "job": {"steps": 2000, "lr": 1e-3, "lr_end": 5e-5, "batch": 4, "warmup": 20, "ema": 0.98}}),
    "textual_inversion_known": subject(lessons.KNOWN, NEW, "", WORD, "textual_inversion", FOUND),
    "textual_inversion": subject(FIRST, NEW, "", WORD, "textual_inversion", FOUND),
    "custom_diffusion": subject(FIRST, NEW, KEYS, WORD, "custom_diffusion", {
        "task": {"word": NEW, "begin": "duck", "instance": f"a {NEW}", **PRIOR},
        "job": {"steps": 2000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "custom_diffusion_two": Lesson("custom_diffusion", lessons.in_places(SECOND, TOY), both, {
        "task": {"word": TOY, "begin": "bread", "instance": f"a {TOY}", **PRIOR},
        "job": {"steps": 2000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "custom_diffusion_together": Lesson("custom_diffusion", lessons.two_in_places, together, {
        "task": {"word": [NEW, TOY], "begin": ["duck", "bread"], **PRIOR},
        "job": {"steps": 3000, "lr": 2e-3, "lr_end": 1e-4, "batch": 4, "ema": 0.97}}),
    "controlnet": Lesson("controlnet", lessons.layouts(2000), steered, {
        "task": {"hint": "edges"},
        "job": {"steps": 600, "lr": 1e-3, "lr_end": 1e-4, "batch": 16, "warmup": 20, "ema": 0.98}}, 120),
    "t2i_adapter": Lesson("t2i_adapter", lessons.layouts(2000), steered, {
        "task": {"hint": "edges"},
        "job": {"steps": 800, "lr": 1e-3, "lr_end": 1e-4, "batch": 16, "warmup": 20, "ema": 0.98}}, 120),
    "super_resolution": Lesson("concat", lessons.small(2000), restored("pool(4)", ("dps",), False), {
        "job": {"steps": 1600, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "ema": 0.98}}, 100),
    "inpainting": Lesson("concat", lessons.layouts(2000), restored("mask(half)", ("repaint", "ddrm"), True), {
        "task": {"kind": "masked"},
        "job": {"steps": 1600, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "ema": 0.98}}, 100),
    "unclip": Lesson("unclip", lessons.layouts(2000), shown, {
        "task": {"encoder": "builtin"}, "data": {"dropout": 0.5},
        "job": {"steps": 1000, "lr": 5e-4, "lr_end": 2e-5, "batch": 16, "warmup": 20, "ema": 0.98}}),
}  # fmt: skip


def trained(name: str, place: Path, settings: list[str]) -> Path:
    """The export of a lesson."""
    lesson, data, processes = LESSONS[name], place / "data", PartialState(cpu=True)
    if processes.is_main_process:
        shutil.rmtree(place, ignore_errors=True)
        data.mkdir(parents=True)
        lesson.data(data)
    processes.wait_for_everyone()
    tables = recipe.read(str(ROOT / "configs" / f"{lesson.recipe}.toml"))
    tables["objective"] |= {"levels": LEVELS}
    for part, values in lesson.tables.items():
        tables[part] = values if part == "lora" else tables[part] | values
    tables["data"] |= {"path": str(data), "cache": str(place.parent / "builtin_cache"), "buckets": False}
    tables["job"] |= {"output": str(place / "run"), "save_every": 200, "precision": "bf16"}
    for setting in settings:
        key, _, value = setting.partition("=")
        part, _, inner = key.partition(".")
        tables[part][inner] = value
    tables["job"]["batch"] = int(tables["job"]["batch"]) // processes.num_processes
    return run(*recipe.build(tables, name))


ABOUT = """# Fine-tuning, proven on the built-in model

`python scripts/finetune_builtin.py`: recipes of `configs/` with the changes that `LESSONS` in that file names, on one thread.
Right: percent of the prompts, with its 95% interval; `scripts/marks.py` says what counts. A sheet has a row of pictures for
every column of its table. A line "with" is a row of the sweep: the same lesson with another setting, and what it then knows.
"""


def section(name: str, found: dict[str, Any]) -> str:
    """The results of a lesson as Markdown."""
    lines, rows = [f"\n## {name.replace('_', ' ')}\n"], found.get("rows", {})
    if rows:
        count = next(iter(next(iter(rows.values()))["right"].values()))["prompts"]
        lines += [f"| right, % of {count} | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
        for mark in next(iter(rows.values()))["right"]:
            cells = ["{right:.0f} ({low:.0f} to {high:.0f})".format(**row["right"][mark]) for row in rows.values()]
            lines.append(f"| {mark} | {' | '.join(cells)} |")
        for mark in next(iter(rows.values()))["other"]:
            lines.append(f"| {mark} | " + " | ".join(f"{row['other'][mark]:.1f}" for row in rows.values()) + " |")
        told = f"Recipe `{LESSONS[name].recipe}`, {found['job']}; trained in {found['seconds'] / 60:.1f} minutes."
        lines += ["", told, "", f"![{name}](finetune_{name}.png)", ""]
    for settings, (right, seconds) in found.get("sweep", {}).items():
        cells = [f"{mark} {one['right']:.0f}" for mark, one in right.items()]
        lines.append(f"- with `{settings}`: {', '.join(cells)} ({seconds / 60:.1f} minutes)")
    return "\n".join([*lines, ""]).replace("<", "&lt;")


def page(folder: Path) -> None:
    """finetune.md, of all lessons that have results."""
    found = {name: kept(folder, f"finetune_{name}") for name in LESSONS}
    text = ABOUT + "".join(section(name, one) for name, one in found.items() if one)
    files.write(folder / "finetune.md", text.encode(), replace=True)


def learn(name: str, args: argparse.Namespace) -> None:
    """Train a lesson, measure its rows, write the figures and a sheet: eight pictures of every row."""
    place = ROOT / "runs" / ("builtin_" + "_".join([name, *args.set]).replace("/", "-"))
    lesson, clock = LESSONS[name], place / "seconds"
    export = place / "run" / "export"
    if not (args.trained and clock.exists()):
        started = time.perf_counter()
        export = trained(name, place, args.set)
        if not PartialState().is_main_process:
            return
        clock.write_text(str(time.perf_counter() - started))
    spent, plain = float(clock.read_text()), Pipeline.from_pretrained("builtin", "cpu", "fp32")
    rows = lesson.rows(export, plain)
    if args.set:  # a row of the sweep: what was taught alone
        rows = dict(list(rows.items())[-1:])
    results = {label: measure(args.prompts or lesson.prompts) for label, measure in rows.items()}
    folder = args.output
    found = kept(folder, f"finetune_{name}")
    shown = {label: {"right": r.right, "other": r.other} for label, r in results.items()}
    if args.set:
        found.setdefault("sweep", {})[" ".join(args.set)] = [next(iter(shown.values()))["right"], spent]
    else:
        job = ", ".join(f"{k} {v}" for k, v in lesson.tables["job"].items())
        found |= {"rows": shown, "seconds": spent, "job": job}
    print(name, args.set, shown, f"{spent:.0f} s", flush=True)
    write(folder, f"finetune_{name}", found)
    page(folder)
    sheet = image.grid([Image.fromarray(p) for r in results.values() for p in r.pictures], 8)
    sheet.save(folder / f"finetune_{name}.png" if not args.set else place / "sheet.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", action="append", default=[], choices=LESSONS, help="all of them where none is named")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="of the recipe: a row of the sweep"
    )
    parser.add_argument("--trained", action="store_true", help="measure what an earlier run trained")
    parser.add_argument("--prompts", type=int, default=0, help="instead of the lesson's")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.job or LESSONS:
        learn(name, args)


if __name__ == "__main__":
    main()
