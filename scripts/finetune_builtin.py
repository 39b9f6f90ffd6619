"""Teach the built-in model something new, and measure what it learned and what it lost. Written to docs/results/.

python scripts/finetune_builtin.py --job lora_style           # 400 steps; 360 took 3.5 minutes on one thread
python scripts/finetune_builtin.py --job textual_inversion    # an object that no training scene showed, from 4 renders
python scripts/finetune_builtin.py --job custom_diffusion
python scripts/finetune_builtin.py --job lora_style --steps 4 --prompts 4 --no-write
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from lessons import WORD, of_style, of_subject, styled, subject
from measuring import ROOT, write
from PIL import Image

from ldm_pipe import Pipeline, adapted, image
from train import recipe
from train.loop import run

LEVELS = {"name": "logit_normal", "mean": 1.0, "deviation": 1.2}  # those that the built-in model was trained with
PRIOR = {"prior": "a cat on a red background", "prior_images": 40}
JOBS: dict[str, dict[str, Any]] = {
    "lora_style": {"recipe": "lora", "data": styled, "measure": of_style, "loras": ("pytorch_lora_weights.safetensors",),
                   "task": {},
                   "lora": {"rank": 16, "layers": ["*attn*.to_?", "*attn*.to_out.0", "*conv?"]},
                   "job": {"steps": 400, "lr": 2e-3, "lr_end": 1e-4, "batch": 8, "warmup": 20, "ema": 0.98}},
    "textual_inversion": {"recipe": "textual_inversion", "data": subject, "measure": of_subject,
                          "words": ("learned_embeds.safetensors",), "task": {"word": WORD, "vectors": 2, "begin": "apple"},
                          "job": {"steps": 600, "lr": 2e-2, "lr_end": 1e-3, "batch": 8, "ema": 0.95}},
    "custom_diffusion": {"recipe": "custom_diffusion", "data": subject, "measure": of_subject,
                         "loras": ("custom_diffusion.safetensors",), "words": ("learned_embeds.safetensors",),
                         "task": {"word": WORD, "begin": "apple", "instance": f"a {WORD}", **PRIOR},
                         "job": {"steps": 400, "lr": 5e-4, "lr_end": 5e-5, "batch": 4, "ema": 0.97}},
}  # fmt: skip


def trained(name: str, place: Path, steps: int) -> Path:
    """The export of a job."""
    plan, data = JOBS[name], place / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    plan["data"](data)
    tables = recipe.read(str(ROOT / "configs" / f"{plan['recipe']}.toml"))
    tables["task"] |= plan["task"]
    tables["data"] |= {"path": str(data), "cache": str(place / "cache"), "buckets": False}
    tables["objective"] |= {"levels": LEVELS}
    tables["job"] |= {**plan["job"], "output": str(place / "run"), "save_every": 200}
    if "lora" in plan:
        tables["lora"] = plan["lora"]
    if steps:
        tables["job"] |= {"steps": steps}
    return run(*recipe.build(tables, name))


def main() -> None:
    """Train, measure before and after, write the figures and a sheet: the first row before, the second after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--steps", type=int, default=0, help="instead of the job's")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--scale", default="1", help="of the low-rank branches when drawing")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    place = ROOT / "runs" / (f"builtin_{args.job}" + (f"_{args.steps}" if args.steps else ""))
    started = time.perf_counter()
    export, plan = trained(args.job, place, args.steps), JOBS[args.job]
    spent = time.perf_counter() - started
    plain = Pipeline.from_pretrained("builtin", "cpu", "fp32")
    words = [str(export / f) for f in plan.get("words", ())]
    taught = adapted(plain, [f"{export / f}:{args.scale}" for f in plan.get("loras", ())], words)
    before, after = (plan["measure"](p, args.prompts) for p in (plain, taught))
    rows = []
    for name, one in before.figures.items():
        cells = [f"{r['right']:.0f} ({r['low']:.0f} to {r['high']:.0f})" for r in (one, after.figures[name])]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    head = f"| right, % of {args.prompts} (95% interval) | before | after |\n|---|---|---|"
    text = "\n".join([head, *rows, "", f"Trained in {spent / 60:.1f} minutes.", ""])
    print(text)
    sheet = image.grid([Image.fromarray(p) for p in (*before.pictures[:8], *after.pictures[:8])], 8)
    if not args.no_write:
        found = {"before": before.figures, "after": after.figures, "seconds": spent}
        write(ROOT / "docs" / "results", f"finetune_{args.job}", found, text)
        sheet.save(ROOT / "docs" / "results" / f"finetune_{args.job}.png")
    sheet.save(place / "sheet.png")


if __name__ == "__main__":
    main()
