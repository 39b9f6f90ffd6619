"""Accuracy against speed: what each preset and patch costs in right images on the built-in model, and gains in time.

    python scripts/bench/tradeoff.py --only accuracy --prompts 200   # about 20 minutes on one free core
    python scripts/bench/tradeoff.py --only costs --latent 64        # about 2 minutes a round

Accuracy: fresh scenes, the same prompts and seeds in every row, graded by the world's grader with 95% intervals; the time is
that of the whole run on the built-in model, CPU seconds of one thread. Costs: CPU seconds of two steps under guidance of a
random U-Net of Stable Diffusion 1.5's size, the first of which computes everything; a ratio for a walk of 50 steps follows from
how many of them do (random weights say what a thing costs, no more). tradeoff.json, .md and .png are written into docs/results/
after every row; a run that is begun again keeps the rows of the same prompts and steps, and adds rounds of costs.
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

from measuring import graded, kept, pyplot, scenes, share, write

from ldm_pipe import CFG, EPS, VP, Cond, Level, Model, Noise, Pipeline, backends, build, calls, guided, levels
from ldm_pipe.doors.patches import SPEED, Patches
from ldm_pipe.patch import Patch, Patched, Run
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
    prompts, began = [captions(s)[0] for s in wanted], time.process_time()
    whole = pipe.plan(prompts, seeds=tuple(range(len(wanted))), steps=steps, batch_size=50)
    done = [i for out in pipe.run(Patches(tuple(texts)).applied(pipe, whole)) for i in out.images]
    took = time.process_time() - began
    return {**share(graded(done, wanted), len(wanted)), "seconds": took / len(wanted), "steps": steps}


def tradeoff(rows: dict[str, dict[str, float]], count: int, steps: int, save: Callable[[], None]) -> None:
    """Fill the rows on the built-in model, by name; those that are there for as many prompts and steps stay."""
    pipe = Pipeline.from_pretrained("builtin", "cpu")
    plan = {name: (steps, texts) for name, texts in ROWS.items()} | {f"{n} steps": (n, ()) for n in STEPS}
    accuracy(pipe, 3, 2, ())  # the first run pays for what is made once
    for name, (length, texts) in plan.items():
        there = rows.get(name, {})
        if (there.get("prompts"), there.get("steps")) != (3 * -(-count // 3), length):
            rows[name] = accuracy(pipe, count, length, texts)
            print(name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
            save()


def costs(rows: dict[str, dict[str, float]], latent: int, dtype: torch.dtype, rounds: int, save: Callable[[], None]) -> None:
    """Fill CPU seconds of a whole step and of a step that reuses, the least of all rounds, and the gain over a walk of 50."""
    from ldm_pipe.networks.light_unet import Config
    from ldm_pipe.networks.light_unet import UNet as Light
    from ldm_pipe.networks.unet import UNet

    torch.manual_seed(0)
    unet = Light(Config(cross_attention_dim=768)).requires_grad_(False).eval()
    for weight in unet.parameters():
        weight.normal_(0, 0.02) if weight.ndim > 1 else nn.init.zeros_(weight)
    model = Model(UNet(unet.to(dtype)), VP.scaled_linear(), EPS, dtype)
    backends.choose(model, "auto", torch.device("cpu"), dtype)
    run = timed(model, latent)
    for _ in range(rounds):
        for name, texts in COSTS.items():
            whole, reused = run(texts)
            row, keys = rows.setdefault(name, {"whole": whole, "reused": reused}), KEYS.get(name, WALK)
            row["whole"], row["reused"] = min(row["whole"], whole), min(row["reused"], reused)
            row["gain"] = WALK * rows["no patch"]["whole"] / (keys * row["whole"] + (WALK - keys) * row["reused"])
            print(name, {k: round(v, 3) for k, v in row.items()}, flush=True)
            save()


def timed(model: Model, latent: int) -> Callable[[Sequence[str]], tuple[float, float]]:
    """A function from patches to the CPU seconds of the two steps of a walk."""
    walk, noise = levels.trailing(model.path, 2), Noise((0,), (4, latent, latent))
    branches = model.branches(cond=Cond(torch.randn(1, 77, 768)), uncond=Cond(torch.randn(1, 77, 768)))

    @torch.no_grad()
    def run(texts: Sequence[str]) -> tuple[float, float]:
        patches: list[Patch] = [build("patch", name, **fields) for name, fields in (calls.fields(t, "patch") for t in texts)]
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
    figure, axes = pyplot().subplots(figsize=(8, 4), layout="constrained")
    for name, row in rows.items():
        mark = "x" if name.endswith("steps") else "s" if name.startswith("--") else "o"
        error = [[row["right"] - row["low"]], [row["high"] - row["right"]]]
        axes.errorbar(1000 * row["seconds"], row["right"], yerr=error, marker=mark, capsize=3, label=name, linestyle="")
    axes.set(xlabel="milliseconds an image", ylabel="right, %", xlim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=110)


def table(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# Accuracy against speed", ""]
    if rows := found.get("accuracy"):
        lines += ["On the built-in model; tradeoff.png shows the same.", ""]
        lines += ["| | right, % (95%) | ms an image | gain |", "|---|---|---|---|"]
        first = next(iter(rows.values()))["seconds"]
        for name, r in rows.items():
            right = f"{r['right']:.1f} ({r['low']:.1f} to {r['high']:.1f})"
            lines.append(f"| {name} | {right} | {1000 * r['seconds']:.0f} | x{first / r['seconds']:.2f} |")
    for size, rows in found.get("costs", {}).items():
        lines += ["", f"## A step of Stable Diffusion 1.5's size, {size}", ""]
        lines += ["| | whole, s | reusing, s | gain over 50 steps |", "|---|---|---|---|"]
        lines += [f"| {n} | {r['whole']:.2f} | {r['reused']:.2f} | x{r['gain']:.2f} |" for n, r in rows.items()]
    return "\n".join([*lines, ""])


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
    torch.set_num_threads(1)
    found, size = kept(args.output, "tradeoff"), f"{args.latent}x{args.latent} latents, {args.dtype}"

    def save() -> None:
        write(args.output, "tradeoff", found, table(found))
        if found.get("accuracy"):
            plot(found["accuracy"], args.output / "tradeoff.png")

    if args.only != "costs":
        tradeoff(found.setdefault("accuracy", {}), args.prompts, args.steps, save)
    if args.only != "accuracy":
        rows = found.setdefault("costs", {}).setdefault(size, {})
        costs(rows, args.latent, getattr(torch, args.dtype), args.rounds, save)


if __name__ == "__main__":
    main()
