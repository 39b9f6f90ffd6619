"""Accuracy against speed: what each preset and patch costs in right images on the built-in model, and gains in time.

    python scripts/bench/tradeoff.py --prompts 200             # tradeoff.json and .png into docs/results/
    python scripts/bench/tradeoff.py --only costs --latent 64  # times alone, on a random U-Net of Stable Diffusion 1.5's size

Accuracy: fresh scenes, the same prompts and seeds in every row, graded by the world's grader with 95% intervals; the time is
that of the whole run on the built-in model. Costs: CPU seconds of two steps under guidance, the first of which computes
everything; a ratio for a walk of 50 steps follows from how many of them do (random weights say what a thing costs, no more).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring import graded, pyplot, scenes, share, write

from ldm_pipe import CFG, EPS, VP, Cond, Level, Model, Noise, Pipeline, build, guided, levels
from ldm_pipe.doors.patches import SPEED, Patches
from ldm_pipe.patch import Patch, Patched, Run
from ldm_pipe.restore.text import call
from train.world.scenes import captions

WALK = 50
ROWS: dict[str, tuple[str, ...]] = {
    "no patch": (), **{f"--speed {name}": texts for name, texts in SPEED.items()},
    "deepcache(2)": ("deepcache(2)",), "deepcache(3)": ("deepcache(3)",), "deepcache(5)": ("deepcache(5)",),
    "faster": ("faster",), "faster, no injection": ("faster(inject=0)",), "tome(0.5)": ("tome(0.5)",),
}  # fmt: skip
STEPS = (6, 10, 15)  # walks without a patch but with fewer steps, which is what a patch has to beat
COSTS = {"no patch": (), "text_cache": ("text_cache",), "tome(0.5)": ("tome(0.5)",), "faster": ("faster(keys='0', inject=0)",),
         "deepcache": ("deepcache(2)",), "balanced": SPEED["balanced"], "fast": SPEED["fast"]}  # fmt: skip
KEYS = {"faster": 9, "deepcache": 25, "balanced": 25, "fast": 17}  # steps of 50 that compute everything


def accuracy(pipe: Pipeline, count: int, steps: int, texts: Sequence[str]) -> dict[str, float]:
    """A row: how many of the images are right, with a 95% interval, and the seconds of a run."""
    wanted = [s for kind in ("one", "two", "count") for s in scenes(kind, "train", -(-count // 3), 91)]
    prompts, began = [captions(s)[0] for s in wanted], time.perf_counter()
    whole = pipe.plan(prompts, seeds=tuple(range(len(wanted))), steps=steps, batch_size=50)
    done = [i for out in pipe.run(Patches(tuple(texts)).applied(pipe, whole)) for i in out.images]
    took = time.perf_counter() - began
    return {**share(graded(done, wanted), len(wanted)), "seconds": took / len(wanted), "steps": steps}


def tradeoff(count: int, steps: int) -> dict[str, dict[str, float]]:
    """The rows on the built-in model, by name."""
    pipe, rows = Pipeline.from_pretrained("builtin"), {}
    plan = {name: (steps, texts) for name, texts in ROWS.items()} | {f"{n} steps": (n, ()) for n in STEPS}
    accuracy(pipe, 3, 2, ())  # the first run pays for what is made once
    for name, (length, texts) in plan.items():
        rows[name] = accuracy(pipe, count, length, texts)
        print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
    return rows


def costs(latent: int, dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of a whole step and of a step that reuses, and the gain over a walk of 50."""
    from ldm_pipe.networks.light_unet import Config
    from ldm_pipe.networks.light_unet import UNet as Light
    from ldm_pipe.networks.unet import UNet

    torch.manual_seed(0)
    unet = Light(Config(cross_attention_dim=768)).requires_grad_(False).eval()
    for weight in unet.parameters():
        weight.normal_(0, 0.02) if weight.ndim > 1 else nn.init.zeros_(weight)
    model = Model(UNet(unet.to(dtype)), VP.scaled_linear(), EPS, dtype)
    run = timed(model, latent)
    rows: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, texts in COSTS.items():
            whole, reused = run(texts)
            best = rows.setdefault(name, {"whole": whole, "reused": reused})
            best["whole"], best["reused"] = min(best["whole"], whole), min(best["reused"], reused)
    for name, row in rows.items():
        keys = KEYS.get(name, WALK)
        row["gain"] = WALK * rows["no patch"]["whole"] / (keys * row["whole"] + (WALK - keys) * row["reused"])
        print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
    return rows


def timed(model: Model, latent: int) -> Callable[[Sequence[str]], tuple[float, float]]:
    """A function from patches to the CPU seconds of the two steps of a walk."""
    walk, noise = levels.trailing(model.path, 2), Noise((0,), (4, latent, latent))
    branches = model.branches(cond=Cond(torch.randn(1, 77, 768)), uncond=Cond(torch.randn(1, 77, 768)))

    @torch.no_grad()
    def run(texts: Sequence[str]) -> tuple[float, float]:
        patches: list[Patch] = [build("patch", name, **fields) for name, fields in (call(t, "patch") for t in texts)]
        denoise, spent = Patched(model, tuple(patches), Run(tuple(walk)))(guided(branches, CFG(3))), []
        for level in walk[:2]:
            spent.append(seconds(denoise, noise.start(), level))
        return spent[0], spent[1]

    return run


def seconds(denoise: Any, x: Tensor, level: Level) -> float:
    """CPU seconds of one evaluation."""
    began = time.process_time()
    denoise(x, level)
    return time.process_time() - began


def plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Right images against the time of one."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name, row in rows.items():
        mark = "x" if name.endswith("steps") else "s" if name.startswith("--") else "o"
        error = [[row["right"] - row["low"]], [row["high"] - row["right"]]]
        axes.errorbar(1000 * row["seconds"], row["right"], yerr=error, marker=mark, capsize=3, label=name, linestyle="")
    axes.set(xlabel="milliseconds an image", ylabel="right, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--prompts", type=int, default=200)
    p.add_argument("--steps", type=int, default=25)
    p.add_argument("--latent", type=int, default=64)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--only", choices=("accuracy", "costs"))
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    found: dict[str, Any] = {}
    if args.only != "costs":
        found["accuracy"] = tradeoff(args.prompts, args.steps)
        plot(found["accuracy"], args.output / "tradeoff.png")
    if args.only != "accuracy":
        found["costs"] = costs(args.latent, getattr(torch, args.dtype), args.rounds)
    write(args.output, "tradeoff", found)


if __name__ == "__main__":
    main()
