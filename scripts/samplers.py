"""Measure every registered sampler on a closed-form Gaussian: its order, its cost, and how near it comes in few evaluations.

    python scripts/samplers.py                      # samplers.md, .json and .png into docs/results/ (half a minute)
    python scripts/samplers.py --model builtin      # with the distance to a long walk on a model (minutes)

The order and W2 are exact propagation of a mean and a covariance, the same on every machine; only samplers that are not
linear in x are measured by draws.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measuring import pyplot, write
from sampler_rows import BUDGETS, measure, within

from ldm_pipe import Level, build, files, levels, registry
from ldm_pipe.walk import Sampler

REFERENCE = 500
PROMPTS = ("a fox on a blue background", "two red apples on a white background", "a bee above a yellow boat", "a green book")
SHOWN = ("ddim", "ddpm", "deis", "dpm2m", "dpm2m_sde", "dpm3m", "edm_churn", "heun", "lms", "ode", "sa_solver", "unipc")
NOTE = """# Samplers on a closed-form Gaussian

Eight values with mean sin(k) and covariance 0.9^|i - j| (total deviation sqrt(8) = 2.83), every sampler with defaults, exact
propagation of mean and covariance (`python scripts/samplers.py`).

- order: log2 of how the W2 distance falls from 40 to 80 steps, from pure noise to u = 0.1 on the flow path with growing steps.
  It is the order of the whole distribution: a sampler with fresh noise has the order of its moments. About 0 means that more
  steps do not lead to the distribution: so it is for the samplers of distilled networks, for DDRM's kernel, and where the
  default adds more noise than it removes (EDM's s_noise); and for `restart`, whose descents have steps of their own.
- calls: evaluations of the network in a full step; the step into sigma = 0 takes one. `ode` decides by its tolerance.
- W2 at 5, 10, 20 and 50 evaluations at most, over `trailing` levels of the linear VP table down to clean (of `ode`: one step,
  and the finest tolerance that so many allow). Lower is better; the ranking is that of a Gaussian and of a perfect network,
  not of images. Where there is no number, so few are not enough. `ode` and `score_sde` are not linear in x: theirs come from
  200,000 draws, and 0.01 is then as good as 0.
- model (with --model): for samplers that draw no noise, how far the latents of four prompts are from those of 500 steps of
  dpm3m from the same noise, relative to the size of the latter.

![W2 against evaluations](samplers.png)
"""


def on_a_model(rows: dict[str, dict[str, Any]], source: str) -> None:
    """Into every row of a sampler that draws nothing: how far its latents are from the reference's, over the latter's size."""
    from ldm_pipe import Pipeline

    pipe = Pipeline.from_pretrained(source, "cpu", "fp32")
    plan = pipe.plan(PROMPTS, seed=0)
    path = pipe.bundle.model.path

    def latents(sampler: Sampler, walk: list[Level]) -> torch.Tensor:
        walked = replace(plan, sampler=sampler, levels=tuple(sampler.walk(walk)))
        return torch.cat([out.latents for out in pipe.run(walked)])

    right = latents(build("sampler", "dpm3m"), levels.trailing(path, REFERENCE))
    for name, row in rows.items():
        if not row["draws"]:
            row["model"] = {}
            for budget in BUDGETS:
                found = within(name, budget, path)
                off = latents(*found) - right if found else None
                row["model"][budget] = None if off is None else float(f"{float(off.norm() / right.norm()):.3g}")
            print(name, row["model"], flush=True)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, by name."""
    model = any("model" in row for row in rows.values())
    head = ["sampler", "order", "calls", *(f"W2 at {b}" for b in BUDGETS), *(f"model at {b}" for b in BUDGETS if model)]
    head += ["defaults"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for name, row in rows.items():
        fields = ", ".join(f"{n}={default}" for n, default in registry.entry("sampler", name).fields)
        measured = [row["order"], row["calls"], *row["w2"].values()]
        measured += list(row.get("model", dict.fromkeys(BUDGETS)).values()) if model else []
        cells = [name, *("" if v is None else v for v in measured), fields.replace('"', "").replace("'", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict[str, Any]]) -> bytes:
    """W2 against evaluations as a PNG."""
    figure, axes = pyplot().subplots(figsize=(8, 5.5), layout="constrained")
    for k, name in enumerate(n for n in SHOWN if n in rows):
        points = [(b, w) for b, w in rows[name]["w2"].items() if w is not None]
        axes.loglog(*zip(*points, strict=True), marker="o", markersize=4, linestyle=("-", "--", ":")[k // 10 % 3], label=name)
    axes.set(xlabel="evaluations of the network", ylabel="W2 to the Gaussian", xticks=BUDGETS, xticklabels=BUDGETS)
    axes.minorticks_off()
    axes.legend(ncols=2, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="*", default=sorted(registry.KINDS["sampler"]), metavar="SAMPLER")
    parser.add_argument("--model", help="builtin or a model folder")
    args = parser.parse_args()
    rows = {}
    for name in args.only:
        rows[name] = measure(name)
        print(name, rows[name], flush=True)
    if args.model:
        on_a_model(rows, args.model)
    files.write(args.output / "samplers.png", plot(rows), replace=True)
    write(args.output, "samplers", rows, NOTE + "\n" + table(rows))


if __name__ == "__main__":
    main()
