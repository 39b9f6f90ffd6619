"""Measure the restoration methods on the built-in model: PSNR, the grader's verdict and the data's residual, against baselines.

python scripts/restoration.py                   # restoration.{md,json,png} into docs/results/
python scripts/restoration.py --pictures 4 --only dps --only ddnm --steps 50
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ldm_pipe import Pipeline, UsageError, files, registry
from ldm_pipe.image import to_pil, to_tensor
from ldm_pipe.restoration import Inpainting, Restoration
from ldm_pipe.restore.text import parse
from train.world import draw_scene, render
from train.world.grader import grade
from train.world.scenes import captions

PROBLEMS = {"pool(4)": 0.0, "mask(half)": 0.0, "blur(gaussian, 3)": 0.05}  # the deviation of the noise that is added
EMPTY = ("ccdf", "ddrm", "ilvr", "repaint", "truncated")  # also without a prompt: what is cheap
IN_LATENTS = ("adir", "blended", "ccdf", "ddnm_plus", "ddrm", "dmps", "ilvr", "repaint")  # what a mask of latents allows
HEAD = ("psnr", "right", "residual", "evaluations", "seconds")
SHOWN, FULL = 4, 32
NOTE = """# Restoration on the built-in model

{count} scenes, seeds paired, `python scripts/restoration.py`. What is degraded is the scene after one round trip through the
codec, so that methods on latents can reach it; a second round trip leaves {ceiling:.1f} dB, which bounds every row. The data
are pictures of 256 levels, with noise of deviation 0.05 (of values in -1..1) under the blur. PSNR in dB, of the missing half
alone under the mask; right: the grader finds what the caption says (in {right:.0f}% of the truths); residual: rms of A x - y,
values span 2. Steps, kernels and the sizes of steps are those of `ldm_pipe/restore/defaults.py`, guidance 1, the prompt is the
scene's caption unless a row says otherwise. Rows "in latents" hold the data by a mask of latents and paste the known pixels at
the end. Seconds are a picture's, on one thread.
"""


def psnr(a: Image.Image, b: Image.Image, problem: str) -> float:
    """In dB; of the right half alone where the left one is known."""
    one, other = (np.asarray(i, dtype=float)[:, i.width // 2 * problem.startswith("mask") :] for i in (a, b))
    return float(10 * np.log10(255**2 / max(np.square(one - other).mean(), 1e-9)))


def baselines(y: torch.Tensor, problem: str) -> dict[str, torch.Tensor]:
    """What needs no network: [1,3,64,64] each."""
    least = parse(problem).guess(torch.zeros(1, 3, 64, 64), y, PROBLEMS[problem])
    if problem.startswith("pool"):
        return {"bicubic": F.interpolate(y, scale_factor=4, mode="bicubic"), "A+ y": least}
    if problem.startswith("mask"):
        return {"mean fill": torch.cat([y[..., :32], y[..., :32].mean((2, 3), keepdim=True).expand(1, 3, 64, 32)], dim=3)}
    return {"no-op": y, "ridge": least}


def attempts(problem: str, only: list[str]) -> dict[str, tuple[Any, bool]]:
    """Name of the row -> (the door, is the prompt given?)."""
    found: dict[str, tuple[Any, bool]] = {}
    for name in only or sorted(registry.KINDS["restoration"]):
        for given in (True, False) if name in EMPTY else (True,):
            suffix = "" if given else ", no prompt"
            if name != "blended" and not (name == "ddnm_scaled" and PROBLEMS[problem] == 0):  # it is ddnm without noise
                found[name + suffix] = Restoration(problem, name, {}, PROBLEMS[problem]), given
            if problem.startswith("mask") and name in IN_LATENTS:
                found[f"{name} in latents{suffix}"] = Inpainting(name), given
    return found


class Table:
    """The rows of a problem, which grow picture by picture, the pictures that are shown, and what is refused."""

    def __init__(self, pipe: Pipeline, problem: str, doors: dict[str, tuple[Any, bool]], steps: dict[str, int]) -> None:
        self.pipe, self.problem, self.doors, self.steps = pipe, problem, doors, steps
        self.operator, self.rng, self.white = parse(problem), np.random.default_rng([2026, 11]), Image.new("L", (64, 64))
        self.white.paste(255, (32, 0, 64, 64))
        self.rows: dict[str, list[dict[str, float]]] = {}
        self.shown: dict[str, list[Image.Image]] = {"truth": [], "degraded": []}
        self.refused: dict[str, str] = {}
        self.about: list[tuple[float, float]] = []  # PSNR of a second round trip, is the truth right?

    def through_codec(self, made: Image.Image) -> Image.Image:
        codec = self.pipe.bundle.codec
        with torch.no_grad():
            return to_pil(codec.decode(codec.encode(to_tensor([made]))))[0]

    def grow(self, k: int) -> None:
        """One more scene, by every door."""
        scene = draw_scene(self.rng, ("one", "two", "count")[k % 3], "train")
        truth = self.through_codec(Image.fromarray(render(scene)))
        clear = self.operator(to_tensor([truth]))
        noise = torch.randn(clear.shape, generator=torch.Generator().manual_seed(k))
        degraded = to_pil(clear + PROBLEMS[self.problem] * noise)[0]
        y = to_tensor([degraded])
        self.about.append((psnr(self.through_codec(truth), truth, ""), 100.0 * grade(np.asarray(truth), scene)))
        self.shown["truth"].append(truth)
        self.shown["degraded"].append(degraded)

        def add(name: str, made: Image.Image, evaluations: int = 0, seconds: float = 0.0) -> None:
            left = float((self.operator(to_tensor([made])) - y).square().mean().sqrt())
            facts = (psnr(made, truth, self.problem), 100.0 * grade(np.asarray(made), scene), left, evaluations, seconds)
            self.rows.setdefault(name, []).append(dict(zip(HEAD, facts, strict=True)))
            self.shown.setdefault(name, []).append(made)

        for name, x in baselines(y, self.problem).items():
            add(name, to_pil(x)[0])
        for name in (n for n in self.doors if n not in self.refused):
            door, given = self.doors[name]
            prompts, started = [captions(scene)[0] if given else ""], time.perf_counter()
            pictures = (degraded,) if isinstance(door, Restoration) else (degraded, self.white)
            try:
                out = next(self.pipe.run(door.plan(self.pipe, prompts, *pictures, seed=k, guidance_scale=1.0, **self.steps)))
                add(name, out.images[0], sum(out.evaluations.values()), time.perf_counter() - started)
            except UsageError as error:
                self.refused[name] = str(error)

    def means(self) -> dict[str, dict[str, float]]:
        return {n: {k: round(float(np.mean([r[k] for r in rows])), 4) for k in HEAD} for n, rows in self.rows.items()}

    def markdown(self) -> str:
        lines = [f"\n## {self.problem}\n", "| | " + " | ".join(HEAD) + " |", "|---|" + "---:|" * len(HEAD)]
        for name, (*facts, evaluations, seconds) in ((n, row.values()) for n, row in self.means().items()):
            lines.append("| {} | {:.1f} | {:.0f}% | {:.4f} | {:.0f} | {:.1f} |".format(name, *facts, evaluations, seconds))
        return "\n".join([*lines, "", *self._refusals()]) + "\n"

    def _refusals(self) -> list[str]:
        which = {why: [n for n, said in self.refused.items() if said == why] for why in self.refused.values()}
        return [f"- refused: {', '.join(n for n in names if ', ' not in n)}: {why}" for why, names in which.items()]


def picture(tables: list[Table], path: Path) -> None:
    """A column for the truth, the degraded picture, every baseline and every method; four pictures to a problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(tables), 1, figsize=(14, 4.6 * len(tables)), layout="constrained", squeeze=False)
    for table, (ax,) in zip(tables, axes, strict=True):
        columns = [[np.asarray(i.resize((64, 64), Image.Resampling.NEAREST)) for i in c[:SHOWN]] for c in table.shown.values()]
        ax.imshow(np.hstack([np.vstack(column) for column in columns]))
        ax.set_xticks([64 * i + 32 for i in range(len(columns))], list(table.shown), rotation=60, ha="right", fontsize=7)
        ax.set_yticks([])
        ax.set_title(table.problem)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=FULL)
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", choices=sorted(registry.KINDS["restoration"]))
    parser.add_argument("--problem", action="append", default=[], choices=list(PROBLEMS))
    parser.add_argument("--steps", type=int, help="of every method, instead of its own")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pipe, started = Pipeline.from_pretrained("builtin", "cpu", "fp32"), time.perf_counter()
    steps = {} if args.steps is None else {"steps": args.steps}
    tables = [Table(pipe, p, attempts(p, args.only), steps) for p in args.problem or PROBLEMS]
    for k in range(args.pictures):
        for table in tables:
            table.grow(k)
        took = (time.perf_counter() - started) / (k + 1) / 60
        print(f"{k + 1} of {args.pictures}; {args.pictures} take about {args.pictures * took:.0f} min", flush=True)
    ceiling, right = (float(column) for column in np.mean(tables[0].about, axis=0))
    found = {t.problem: {"rows": t.means(), "refused": t.refused} for t in tables}
    result = {"pictures": args.pictures, "ceiling": ceiling, "right": right, "problems": found}
    text = NOTE.format(count=args.pictures, ceiling=ceiling, right=right) + "".join(t.markdown() for t in tables)
    files.write(args.output / "restoration.json", (json.dumps(result, indent=1) + "\n").encode(), replace=True)
    files.write(args.output / "restoration.md", text.encode(), replace=True)
    picture(tables, args.output / "restoration.png")
    print(f"the codec's ceiling is {ceiling:.2f} dB; {FULL} pictures take about {FULL * took:.0f} min")


if __name__ == "__main__":
    main()
