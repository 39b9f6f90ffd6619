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
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from curriculum import LESSONS
from measuring import ROOT, kept, write
from PIL import Image

from ldm_pipe import Pipeline, files, image
from train import recipe
from train.loop import run

LEVELS = {"name": "logit_normal", "mean": 1.0, "deviation": 1.2}  # those that the built-in model was trained with


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
    tables["job"]["batch"], rest = divmod(int(tables["job"]["batch"]), processes.num_processes)
    if rest:
        raise SystemExit(f"the batch of {name} is no multiple of {processes.num_processes} processes")
    return run(*recipe.build(tables, name))


ABOUT = """# Fine-tuning, proven on the built-in model

`python scripts/finetune_builtin.py`: recipes of `configs/` with the changes that `scripts/curriculum.py` names, on one thread.
Right: percent of the prompts, with its 95% interval; `scripts/marks.py` says what counts. A sheet has a row of pictures for
every column of its table. A line "with" is a row of the sweep: the same lesson with another setting or other pictures, and what
it then knows. Minutes were taken with another training on the second core, sometimes two.
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
        told = f"Recipe `{LESSONS[name].recipe}`, {found['job']}; trained in {found['seconds'] / 60:.1f} minutes"
        told += " on two threads." if found.get("threads", 1) == 2 else "."
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
        if PartialState().is_main_process:
            clock.write_text(str(time.perf_counter() - started))
    if not PartialState(cpu=True).is_main_process:
        return
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
        threads = PartialState().num_processes
        found |= {"rows": shown, "seconds": spent, "job": job, "threads": threads}
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
