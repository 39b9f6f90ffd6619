"""What the trained restorations of `finetune_builtin.py` are compared with, and how right each is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from marks import Result, through_codec
from measuring import graded, scenes, share
from PIL import Image
from restoration_rows import psnr

from ldm_pipe import Pipeline
from ldm_pipe.doors.restoration import Inpainting, Restoration
from ldm_pipe.image import to_pil, to_tensor
from ldm_pipe.restore.text import parse
from train.world import render
from train.world.scenes import captions

Restorer = Callable[[Pipeline, Image.Image, str, int], Image.Image]  # degraded picture, prompt and seed -> restored


def of_restored(operator: str, by: Restorer) -> Callable[[Pipeline, int], Result]:
    """Scenes through the codec, degraded and restored: PSNR in dB, and what the grader says. The same scenes for all."""

    def measure(pipe: Pipeline, count: int) -> Result:
        wanted = [s for kind in ("one", "two", "count") for s in scenes(kind, "train", -(-count // 3), 96)][:count]
        pictures, gains = [], []
        for k, scene in enumerate(wanted):
            truth = through_codec(pipe, render(scene))
            degraded = to_pil(parse(operator)(to_tensor([truth])))[0]
            pictures.append(by(pipe, degraded, captions(scene)[0], k))
            gains.append(psnr(pictures[-1], truth, ""))
        right = share(graded(pictures, wanted), count)
        shown = [np.asarray(pictures[k * count // 8]) for k in range(8)]  # all kinds of scenes
        return Result(shown, {"right": right}, {"PSNR, dB": float(np.mean(gains))})

    return measure


def bicubic(_: Pipeline, degraded: Image.Image, prompt: str, seed: int) -> Image.Image:
    """Without a network."""
    return degraded.resize((64, 64), Image.Resampling.BICUBIC)


def half() -> Image.Image:
    """The mask of the right half."""
    white = Image.new("L", (64, 64))
    white.paste(255, (32, 0, 64, 64))
    return white


def mean_fill(_: Pipeline, degraded: Image.Image, prompt: str, seed: int) -> Image.Image:
    """The mean colour of what is known."""
    pixels = np.array(degraded)
    pixels[:, 32:] = pixels[:, :32].reshape(-1, 3).mean(0)
    return Image.fromarray(pixels)


def zero_shot(operator: str, method: str) -> Restorer:
    """A method that takes the model as it is, with the settings of `scripts/restoration.py`."""

    def by(pipe: Pipeline, degraded: Image.Image, prompt: str, seed: int) -> Image.Image:
        inpaint = operator.startswith("mask")
        door: Any = Inpainting(method) if inpaint else Restoration(operator, method)
        pictures = (degraded, half()) if inpaint else (degraded,)
        return next(pipe.run(door.plan(pipe, [prompt], *pictures, seed=seed, guidance_scale=1.0))).images[0]

    return by


def concatenated(masked: bool) -> Restorer:
    """A model that reads the degraded picture behind x."""

    def by(pipe: Pipeline, degraded: Image.Image, prompt: str, seed: int) -> Image.Image:
        given = degraded if masked else degraded.resize((64, 64), Image.Resampling.BICUBIC)
        out = pipe(prompt, seed=seed, init_image=given, mask=half() if masked else None, strength=1.0, guidance_scale=1.0)
        return out.images[0]

    return by
