"""The rows of `restoration.py`: a problem, the baselines without a network, and every method through its door."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import graded
from PIL import Image

from ldm_pipe import Pipeline, UsageError, registry
from ldm_pipe.doors.restoration import Inpainting, Restoration
from ldm_pipe.image import to_pil, to_tensor
from ldm_pipe.restore.text import parse
from train.world import draw_scene, render
from train.world.scenes import Scene, captions

PROBLEMS = {"pool(4)": 0.0, "mask(half)": 0.0, "blur(gaussian, 3)": 0.05}  # the deviation of the noise that is added
EMPTY = ("ccdf", "ddrm", "ilvr", "repaint", "truncated")  # also without a prompt: what is cheap
IN_LATENTS = ("adir", "blended", "ccdf", "ddnm_plus", "ddrm", "dmps", "ilvr", "repaint")  # what a mask of latents allows
HEAD = ("psnr", "right", "residual", "evaluations", "seconds")


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

    def __init__(
        self, pipe: Pipeline, problem: str, doors: dict[str, tuple[Any, bool]], steps: dict[str, int], before: dict[str, Any]
    ) -> None:
        """before: what an earlier run wrote of the problem, which is gone on with."""
        self.pipe, self.problem, self.doors, self.steps = pipe, problem, doors, steps
        self.operator, self.rng, self.white = parse(problem), np.random.default_rng([2026, 11]), Image.new("L", (64, 64))
        self.white.paste(255, (32, 0, 64, 64))
        each = before.get("each", {})
        self.rows: dict[str, list[dict[str, float]]] = {
            n: [dict(zip(HEAD, r, strict=True)) for r in e] for n, e in each.items()
        }
        self.shown: dict[str, list[Image.Image]] = {"truth": [], "degraded": []}
        self.refused: dict[str, str] = dict(before.get("refused", {}))
        # PSNR of a second round trip, and is the truth right?
        self.about: list[tuple[float, float]] = list(before.get("about", []))
        self.whole = not self.about  # are the pictures that are shown all there?
        for k in range(self.pictures):
            self._scene(k)

    @property
    def pictures(self) -> int:
        """How many were measured."""
        return len(self.about)

    def _scene(self, k: int) -> Scene:
        return draw_scene(self.rng, ("one", "two", "count")[k % 3], "train")

    def through_codec(self, made: Image.Image) -> Image.Image:
        codec = self.pipe.bundle.codec
        with torch.no_grad():
            return to_pil(codec.decode(codec.encode(to_tensor([made]))))[0]

    def grow(self, k: int) -> None:
        """One more scene, by every door."""
        scene = self._scene(k)
        truth = self.through_codec(Image.fromarray(render(scene)))
        clear = self.operator(to_tensor([truth]))
        noise = torch.randn(clear.shape, generator=torch.Generator().manual_seed(k))
        degraded = to_pil(clear + PROBLEMS[self.problem] * noise)[0]
        y = to_tensor([degraded])
        self.about.append((psnr(self.through_codec(truth), truth, ""), 100.0 * graded([truth], [scene])))
        self.shown["truth"].append(truth)
        self.shown["degraded"].append(degraded)

        def add(name: str, made: Image.Image, evaluations: int = 0, seconds: float = 0.0) -> None:
            left = float((self.operator(to_tensor([made])) - y).square().mean().sqrt())
            facts = (psnr(made, truth, self.problem), 100.0 * graded([made], [scene]), left, evaluations, seconds)
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


def markdown(problem: str, found: dict[str, Any]) -> str:
    """The table of a problem, as `report` stores it."""
    said = "{pictures} scenes; ceiling {ceiling:.1f} dB; the grader finds {right:.0f}% of the truths right.".format(**found)
    lines = [f"\n## {problem}\n", said, "", "| | " + " | ".join(HEAD) + " |", "|---|" + "---:|" * len(HEAD)]
    for name, row in found["rows"].items():
        psnr, right, residual, evaluations, seconds = (row[k] for k in HEAD)
        lines.append(f"| {name} | {psnr:.1f} | {right:.0f}% | {residual:.4f} | {evaluations:.0f} | {seconds:.1f} |")
    refused = found["refused"]
    for why in dict.fromkeys(refused.values()):
        names = ", ".join(n for n, said in refused.items() if said == why and ", " not in n)
        lines.append(f"\nRefused: {names}: {why}")
    return "\n".join([*lines, "", f"![{problem}]({found['picture']})", ""])
