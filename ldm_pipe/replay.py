"""Making an image again from its recipe, and saying how near the copy is."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from ldm_pipe import __version__
from ldm_pipe.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.pipeline import Output, Pipeline

LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "pillow")
SHARED = [f.name for f in dataclasses.fields(Recipe)]


def recipe_of(out: Output, pipe: Pipeline, index: int) -> Recipe:
    """The recipe of image number `index` of a call's output."""
    import torch

    settings, count = out.settings, len(out.images)
    first = index // settings.batch_size * settings.batch_size
    given = {n: getattr(settings, n) for n in SHARED if hasattr(settings, n)}
    cpu = pipe.device.type == "cpu"
    return Recipe(
        **given
        | {"prompt": out.prompts[index], "seed": out.seeds[index]}
        | {"batch": min(settings.batch_size, count - first), "row": index - first}
        | {"model": pipe.name, "digests": dict(pipe.bundle.digests), "dtype": str(pipe.dtype).removeprefix("torch.")}
        | {"device": platform.machine() if cpu else torch.cuda.get_device_name(pipe.device)}
        | {"threads": torch.get_num_threads() if cpu else 0, "versions": _versions()}
    )


def _versions() -> dict[str, str]:
    return {"ldm_pipe": __version__, "python": platform.python_version()} | {n: metadata.version(n) for n in LIBRARIES}


@dataclass(frozen=True)
class Verdict:
    """How a replayed image compares with the file. largest: of the differences, in 256 levels; facts: what has changed."""

    largest: int
    facts: tuple[str, ...]

    def __str__(self) -> str:
        changed = "; recorded facts that differ: " + ", ".join(self.facts) if self.facts else ""
        if self.largest == 0:
            return "bit-equal" + changed
        return f"not equal, the largest difference is {self.largest} of 255" + (changed or "; no recorded fact differs")


def again(recipe: Recipe, pipe: Pipeline) -> Output:
    """Run a recipe. The image is computed in a batch of the recorded size, at its place in it."""
    names = {"negative_prompt", "steps", "guidance_scale", "guide", "sampler", "spacing", "sampler_set", "spacing_set"}
    settings = {n: getattr(recipe, n) for n in (*names, "height", "width")}
    seeds = (recipe.seed,) * recipe.batch
    out = pipe([recipe.prompt] * recipe.batch, seeds=seeds, batch_size=recipe.batch, **settings)
    row = slice(recipe.row, recipe.row + 1)
    return dataclasses.replace(out, images=out.images[row], latents=out.latents[row], prompts=out.prompts[row], seeds=seeds[:1])


def verify(original: Image, recipe: Recipe, out: Output, pipe: Pipeline) -> Verdict:
    """Compare an image with its replay."""
    import numpy as np

    before, after = (np.asarray(i.convert("RGB"), dtype=int) for i in (original, out.images[0]))
    largest = 255 if before.shape != after.shape else int(np.abs(before - after).max())
    now = dataclasses.replace(recipe_of(out, pipe, 0), batch=recipe.batch, row=recipe.row)
    return Verdict(largest, tuple(recipe.differences(now)))
