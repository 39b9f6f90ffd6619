"""What the built-in model knows, read out of it: classes, features, a direction, doubt. Written to docs/results/.

    python scripts/analysis.py                    # about 6 minutes on one thread: analysis.md, .json and h_space.png
    python scripts/analysis.py --only features

Classifier: 200 renders of one object, ten objects to choose from, on one ground a group; 8 draws for all, 24 for the best four.
Features: renders of 20 objects on all grounds, 600 to fit a linear head, 400 to test it. h-space: the mean difference of the
middle features between a red and a blue ground, added to objects that had no part in it. Score: four draws of a prompt each.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import evaluate

from ldm_pipe import Noise, Pipeline, files, image, levels
from ldm_pipe.analysis.classifier import classify
from ldm_pipe.analysis.features import LinearHead, features
from ldm_pipe.analysis.h_space import HSpace, Watching, difference
from ldm_pipe.analysis.hallucination import FINE, fine_end, scores
from ldm_pipe.model import Denoiser
from ldm_pipe.patch import Patch, root
from ldm_pipe.plan import patched
from train.world import COLOURS, Scene, objects, render
from train.world.grader import grade
from train.world.nearest import nearest
from train.world.scenes import SIZE, Placed, article, captions

LAYERS = ("down_blocks.1.attentions.0", "mid_block", "up_blocks.0", "up_blocks.1")
TIMES = (50, 150, 300, 500)  # of 1000, where features are read
FROM, TO = "blue", "red"


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
    walk = levels.trailing(pipe.bundle.model.path, 24)[:-1]
    for _ in range(groups):
        names = [objects()[i] for i in rng.choice(len(objects()), choices, replace=False)]
        colour = str(rng.choice(list(COLOURS)))
        wanted = [one(rng, names[k % choices], colour) for k in range(each)]
        x0 = encoded(pipe, wanted)
        classes = {name: under(pipe, f"{article(name)} on {article(colour)} background") for name in names}
        noise = Noise(tuple(range(each)), tuple(x0.shape[1:]))
        found = classify(classes, x0, walk, noise, ((8, 4), (24, 1)))
        right += sum(best == s.names[0] for best, s in zip(found.best, wanted, strict=True))
        evaluations += found.evaluations
    return {**evaluate.share(right, groups * each), "choices": choices, "evaluations_each": evaluations / (groups * each)}


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


def drawn(pipe: Pipeline, names: list[str], colour: str, patch: Patch) -> list[Any]:
    """Images of objects on a ground under a patch, as one batch; image k has seed k."""
    prompts = [f"{article(name)} on {article(colour)} background" for name in names]
    whole = pipe.plan(prompts, seeds=tuple(range(len(names))), batch_size=len(names))
    return next(pipe.run(patched(whole, pipe.bundle.model, [patch]))).images


def direction(pipe: Pipeline, folder: Path, count: int = 24) -> dict[str, Any]:
    """What the direction from one ground to another does to objects it was not made of: rows by its scale, and a picture."""
    names = [objects()[i] for i in np.random.default_rng(2210).choice(len(objects()), 2 * count, replace=False)]
    groups = []
    for colour in (TO, FROM):
        kept: list[Tensor] = []
        drawn(pipe, names[:count], colour, Watching(kept))
        groups.append(torch.stack(kept, 1))  # [B,steps,C,h,w]
    way, rows, sheet = difference(*groups), dict[str, Any](), []
    other = torch.randn(way.shape, generator=torch.Generator().manual_seed(0))
    other *= way.flatten(1).norm(dim=1)[:, None, None, None] / other.flatten(1).norm(dim=1)[:, None, None, None]
    for name, toward, scale in [(f"{s:g}", way, s) for s in (0.0, 1.0, 2.0, 3.0, 4.0)] + [("4, random", other, 4.0)]:
        pictures = drawn(pipe, names[count:], FROM, HSpace(toward, scale))
        seen = [nearest(np.asarray(i), 1) for i in pictures]
        same = sum(bool(r.found) and r.found[0].name == n for r, n in zip(seen, names[count:], strict=True))
        rows[name] = {c: 100 * sum(r.colour == c for r in seen) / count for c in (FROM, TO)} | {"object": 100 * same / count}
        sheet.append(pictures[:8])
    out = io.BytesIO()
    image.grid([i for row in sheet for i in row], 8).save(out, "PNG")
    files.write(folder / "h_space.png", out.getvalue(), replace=True)
    return rows


def doubt(pipe: Pipeline, prompts: int = 34, draws: int = 4) -> dict[str, float]:
    """How far the hallucination score tells images that the grader finds right from the others."""
    wanted = [s for kind in ("one", "two", "count") for s in evaluate.scenes(kind, "train", -(-prompts // 3), 59)][:prompts]
    whole = fine_end(pipe.plan([captions(s)[0] for s in wanted], num_images=draws, seed=0), pipe.bundle.model.path)
    found, right, steps = [], [], []
    for out in pipe.run(whole, steps.append):
        found.append(scores(steps, float(whole.levels[-FINE - 1].u)))
        steps.clear()
        right += [grade(np.asarray(i), wanted[(len(right) + k) // draws]) for k, i in enumerate(out.images)]
    score, good = torch.cat(found).log().numpy(), np.array(right)
    rank = np.empty(len(score))
    rank[score.argsort()] = np.arange(1, len(score) + 1)
    n, m = int(good.sum()), int((~good).sum())
    lowest = good.reshape(prompts, draws)[np.arange(prompts), score.reshape(prompts, draws).argmin(1)]
    return {"samples": len(score), "correlation": float(np.corrcoef(score, good)[0, 1]),
            "auc": float((rank[~good].sum() - m * (m + 1) / 2) / max(1, n * m)), "right": 100 * float(good.mean()),
            "right_lowest_half": 100 * float(good[rank <= len(rank) / 2].mean()), "right_best_of_draws": 100 * float(lowest.mean())}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The page of results."""
    lines = ["# What the built-in model knows", ""]
    if c := found.get("classifier"):
        lines += [f"**Diffusion Classifier.** {c['right']:.1f}% ({c['low']:.0f} to {c['high']:.0f}) of {c['prompts']} renders among "
                  f"{c['choices']} objects, {c['evaluations_each']:.0f} evaluations each; chance is {100 / c['choices']:.0f}%.", ""]  # fmt: skip
    if probe := found.get("features"):
        lines += ["**Linear head on features**, accuracy in % among 20 objects. Pixels: "
                  f"{probe['pixels']:.1f}, latents: {probe['latents']:.1f}.", ""]  # fmt: skip
        lines += ["| layer | " + " | ".join(f"t = {t}" for t in TIMES) + " |", "|---" * (1 + len(TIMES)) + "|"]
        lines += [f"| {n} | " + " | ".join(f"{probe[f'{n} at {t}']:.1f}" for t in TIMES) + " |" for n in LAYERS]
    return "\n".join(lines)
