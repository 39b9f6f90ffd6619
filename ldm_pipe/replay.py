"""Making an image again from its recipe, and saying how near the copy is."""

from __future__ import annotations

import dataclasses
import io
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ldm_pipe import __version__, strict
from ldm_pipe.doors.controls import Controls
from ldm_pipe.doors.edit import Edit
from ldm_pipe.doors.hallucinations import Filter
from ldm_pipe.doors.hires import Hires
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.doors.patches import Patches
from ldm_pipe.doors.restoration import Inpainting, Restoration
from ldm_pipe.errors import UsageError
from ldm_pipe.recipe import FORMATS, Recipe, encode
from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan

NONE = Controls()
LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "pillow")
SHARED = [f.name for f in dataclasses.fields(Recipe)]


def recipe_of(out: Output, pipe: Pipeline, index: int) -> Recipe:
    """The recipe of image number `index` of a call's output."""
    import torch

    settings, (batch, row) = out.settings, out.places[index]
    given = {n: getattr(settings, n) for n in SHARED if hasattr(settings, n)}
    cpu = pipe.device.type == "cpu"
    return Recipe(
        **given
        | {"prompt": out.prompts[index], "seed": out.seeds[index]}
        | {"batch": batch, "row": row, **out.recorded}
        | {"model": pipe.name, "digests": dict(pipe.bundle.digests), "dtype": str(pipe.dtype).removeprefix("torch.")}
        | {"device": platform.machine() if cpu else torch.cuda.get_device_name(pipe.device)}
        | {"attention": pipe.attention, "adapters": tuple(map(dict, pipe.bundle.adapters))}
        | {"partial": tuple(map(dict, pipe.bundle.partial)), "tile": out.tiles[index] if out.tiles else 0}
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


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The keywords of the pipeline that run a recipe again."""
    names = ("negative_prompt", "steps", "strength", "guidance_scale", "guide", "sampler", "spacing", "height", "width")
    given = {n: getattr(recipe, n) for n in (*names, "sampler_set", "spacing_set")}
    given["plain_prompt"] = recipe.plain_prompt
    return given | {"seeds": (recipe.seed,) * recipe.batch, "batch_size": recipe.batch}


def again(recipe: Recipe, pipe: Pipeline, pictures: Mapping[str, Any] | None = None, controls: Controls = NONE) -> Output:
    """Run a recipe. The image is computed in a batch of the recorded size, at its place in it. pictures: what it started from,
    as "init_image", "mask", "input", "image_prompt", and as "controls" those of `controls` in order. Raises UsageError where
    those are not the ones it was made from."""
    given = dict(pictures or {})
    for name in ("init_image", "mask", "input", "image_prompt"):
        if (name in recipe.sources) != (name in given):
            wanted = "is needed: the image was made from one" if name in recipe.sources else "was not used for it"
            raise UsageError(f"--{name.replace('_', '-')} {wanted}")
    picture, mask, settings = given.get("input"), given.get("mask"), settings_of(recipe)
    if recipe.edit:
        _check_edited(recipe, pipe, picture, mask)  # before its inversion, which takes time
        whole = strict.build(Edit, recipe.edit, "edit").plan(pipe, picture, mask, **settings)
    elif recipe.restoration:
        whole = _restored(recipe, pipe, given)
    else:
        whole = pipe.plan([recipe.prompt] * recipe.batch, None, given.get("init_image"), mask, **settings)

    whole = strict.build(Filter, recipe.filtered, "recipe: filtered").applied(pipe.bundle.model, whole)
    if "image_prompt" in given:
        shown = strict.build(ImagePrompt, recipe.image_prompt, "recipe: image_prompt")
        whole = shown.applied(pipe, whole, given["image_prompt"])

    def dress(plan: Plan) -> Plan:
        plan = controls.again(recipe.controls).applied(pipe, plan, given.get("controls", ()))
        return Patches(recipe.patches, recipe.speed).applied(pipe, plan)

    whole = strict.build(Hires, recipe.hires, "hires").applied(pipe, whole, dress) if recipe.hires else dress(whole)
    for name, digest in whole.recorded.get("sources", {}).items():
        if digest != recipe.sources[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not the picture that the image was made from")
    out = next(pipe.run(dataclasses.replace(whole, tile=recipe.tile)))
    row = slice(recipe.row, recipe.row + 1)
    kept = {n: getattr(out, n)[row] for n in ("images", "latents", "prompts", "seeds", "places", "tiles")}
    return dataclasses.replace(out, **kept)


def _check_edited(recipe: Recipe, pipe: Pipeline, picture: Image | None, mask: Image | None) -> None:
    """Raise UsageError where the picture is not the one that was edited."""
    if picture is None:
        return
    from ldm_pipe.editing.source import Source

    given = pipe.resolve(Settings(height=recipe.height, width=recipe.width))
    used = Source(picture, mask).fitted(int(given.width or 0), int(given.height or 0))
    if used.digests["init_image"] != recipe.sources["input"]:
        raise UsageError("--input is not the picture that the image was made from")


def _restored(recipe: Recipe, pipe: Pipeline, given: Mapping[str, Image]) -> Plan:
    """The plan of a recipe that names a restoration, of a degraded picture or under a mask."""
    found, prompts, settings = recipe.restoration, [recipe.prompt] * recipe.batch, settings_of(recipe)
    if "operator" in found and "input" in given:
        return strict.build(Restoration, found, "restoration").plan(pipe, prompts, given["input"], **settings)
    if "operator" in found or "init_image" not in given:
        raise UsageError("the recipe names a restoration, but no picture that it was made from")
    inpainting = strict.build(Inpainting, found, "restoration")
    return inpainting.plan(pipe, prompts, given["init_image"], given.get("mask"), **settings)


def verify(path: str | os.PathLike[str], recipe: Recipe, out: Output, pipe: Pipeline) -> Verdict:
    """Compare an image file with its replay, which goes through the same file format first."""
    import numpy as np
    from PIL import Image as Picture

    with Picture.open(path, formats=FORMATS) as original:
        copy = Picture.open(io.BytesIO(encode(out.images[0], None, original.format or "PNG")))
        before, after = (np.asarray(i.convert("RGB"), dtype=int) for i in (original, copy))
    largest = 255 if before.shape != after.shape else int(np.abs(before - after).max())
    return Verdict(largest, tuple(recipe.differences(recipe_of(out, pipe, 0))))
