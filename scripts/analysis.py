"""What the built-in model knows, read out of it: classes and features. Into docs/results/analysis.md and .json.

    python scripts/analysis.py                    # about 4 minutes on one thread
    python scripts/analysis.py --only features

Classifier: 200 renders of one object, ten objects to choose from, on one ground a group; 6 draws for all, 16 for three.
Features: renders of 20 objects on all grounds, 600 to fit a linear head, 400 to test it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measuring

from ldm_pipe import Noise, Pipeline, files, levels
from ldm_pipe.analysis.classifier import classify
from ldm_pipe.analysis.features import LinearHead, features
from ldm_pipe.model import Denoiser
from ldm_pipe.patch import root
from train.world import COLOURS, Scene, objects, render
from train.world.scenes import SIZE, Placed, article

LAYERS = ("down_blocks.1.attentions.0", "mid_block", "up_blocks.0", "up_blocks.1")
TIMES = (50, 150, 300, 500)  # of 1000, where features are read


def one(rng: np.random.Generator, name: str, colour: str) -> Scene:
    """A scene of one object, of any size and place that scenes have."""
    placed = Placed(name, int(rng.integers(32, 47)), 0, 0)
    h, w = placed.shape
    at = {"x": int(rng.integers(2, SIZE - w - 1)), "y": int(rng.integers(2, SIZE - h - 1))}
    return Scene("one", colour, (replace(placed, **at),))


def pixels(wanted: list[Scene]) -> Tensor:
    """Renders [N,3,64,64] in -1..1."""
    return torch.from_numpy(np.stack([render(s) for s in wanted])).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encoded(pipe: Pipeline, wanted: list[Scene]) -> Tensor:
    """Their latents."""
    return torch.cat([pipe.bundle.codec.encode(part) for part in pixels(wanted).split(50)])


def under(pipe: Pipeline, prompt: str) -> Denoiser:
    """The denoiser of any number of images of one prompt."""
    cond = pipe.bundle.text([prompt])
    return lambda x, level: pipe.bundle.model.bind(cond.repeat(len(x)))(x, level)


def classifier(pipe: Pipeline, groups: int = 8, each: int = 25, choices: int = 10) -> dict[str, Any]:
    """The share of renders whose object is the one under whose caption the network tells the noise best."""
    rng, right, evaluations = np.random.default_rng(2303), 0, 0
    walk = levels.trailing(pipe.bundle.model.path, 16)[:-1]
    for _ in range(groups):
        names = [objects()[i] for i in rng.choice(len(objects()), choices, replace=False)]
        colour = str(rng.choice(list(COLOURS)))
        wanted = [one(rng, names[k % choices], colour) for k in range(each)]
        x0 = encoded(pipe, wanted)
        classes = {name: under(pipe, f"{article(name)} on {article(colour)} background") for name in names}
        noise = Noise(tuple(range(each)), tuple(x0.shape[1:]))
        found = classify(classes, x0, walk, noise, ((6, 3), (16, 1)))
        right += sum(best == s.names[0] for best, s in zip(found.best, wanted, strict=True))
        evaluations += found.evaluations
    return {**measuring.share(right, groups * each), "choices": choices, "evaluations_each": evaluations / (groups * each)}


def probes(pipe: Pipeline, fit: int = 600, test: int = 400, count: int = 20) -> dict[str, float]:
    """Accuracy of a linear head on pixels, on latents, and on features by time and layer, in percent."""
    rng = np.random.default_rng(2303)
    names = [objects()[i] for i in rng.choice(len(objects()), count, replace=False)]
    labels = torch.arange(fit + test) % count
    wanted = [one(rng, names[int(k)], str(rng.choice(list(COLOURS)))) for k in labels]
    x0, found = encoded(pipe, wanted), {"pixels": pixels(wanted).flatten(1)}
    found["latents"] = x0.flatten(1)
    noise = Noise(tuple(range(len(x0))), tuple(x0.shape[1:])).start()
    for t in TIMES:
        level, rows = pipe.bundle.model.path.level(t), []
        for part, drawn in zip(x0.split(50), noise.split(50), strict=True):
            rows.append(features(under(pipe, ""), root(pipe.bundle.model), part, drawn, level, LAYERS))
        found |= {f"{layer} at {t}": torch.cat([row[layer] for row in rows]) for layer in LAYERS}
    return {n: 100 * LinearHead.fit(x[:fit], labels[:fit]).accuracy(x[fit:], labels[fit:]) for n, x in found.items()}


def table(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# What the built-in model knows", ""]
    if c := found.get("classifier"):
        lines += [
            f"**Diffusion Classifier.** {c['right']:.1f}% ({c['low']:.0f} to {c['high']:.0f}) of {c['prompts']} renders among "
            f"{c['choices']} objects, {c['evaluations_each']:.0f} evaluations each; chance is {100 / c['choices']:.0f}%.",
            "",
        ]
    if probe := found.get("features"):
        others = f"Pixels: {probe['pixels']:.1f}, latents: {probe['latents']:.1f}."
        lines += [f"**Linear head on features**, accuracy in % among 20 objects, by layer and time. {others}", ""]
        lines += ["| layer | " + " | ".join(f"t = {t}" for t in TIMES) + " |", "|---" * (1 + len(TIMES)) + "|"]
        lines += [f"| {n} | " + " | ".join(f"{probe[f'{n} at {t}']:.1f}" for t in TIMES) + " |" for n in LAYERS] + [""]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    p.add_argument("--only", choices=("classifier", "features"))
    p.add_argument("--output", type=Path, default=Path("docs/results"))
    args = p.parse_args()
    pipe, path = Pipeline.from_pretrained("builtin"), args.output / "analysis.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, door in {"classifier": classifier, "features": probes}.items():
        if args.only in (None, name):
            began = time.perf_counter()
            found[name] = door(pipe)
            print(name, found[name], f"{time.perf_counter() - began:.0f} s", flush=True)
            files.write(path, (json.dumps(found, indent=1) + "\n").encode(), replace=True)
    files.write(path.with_suffix(".md"), table(found).encode(), replace=True)


if __name__ == "__main__":
    main()
