"""What `generate` does once its flags are read: make images, make one again, show a recipe, list what there is."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import check, listing, recipe
from ldm_pipe.errors import UsageError
from ldm_pipe.looking import attention_maps, compare
from ldm_pipe.looking.watch import Watch
from ldm_pipe.output import Target
from ldm_pipe.request import Request
from ldm_pipe.settings import ATTENTIONS, Settings

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def run(request: Request) -> int:
    """Do what is asked; the exit code."""
    if request.list is not None:
        return listing.show(request.list)
    if request.check:
        return check.examine(request)
    if request.doctor:
        return compare.examine(request)
    if request.show is not None:
        found = recipe.read(request.show)
        print(json.dumps(dataclasses.asdict(found), indent=1) if request.json else found.summary())
        return 0
    return _generate(request) if request.replay is None else _replay(request, request.replay)


def _generate(request: Request) -> int:
    prompts, seeds = request.texts()
    settings = request.settings(seeds)
    count = 1 if request.sweep else len(prompts) * request.num_images + request.grid
    target = Target.of(request.output, count, request.force)
    recipe.check_fits(prompts, request.negative_prompt, target.format)
    started = time.perf_counter()
    if request.edit is not None:
        request.edited().check()

    sources = _sources(request)
    from ldm_pipe.device import pick_device, pick_dtype
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.wording import notices

    say = Notes(request.quiet)
    say(pick_dtype(request.dtype, pick_device(request.device))[1])
    pipe = Pipeline.from_pretrained(request.model, request.device, request.dtype, request.attention, **request.loading())
    pipe = request.adapters().applied(pipe, say)
    for prompt in dict.fromkeys(prompts):
        say(*notices(pipe.bundle.text, prompt, request.plain_prompt))
    say(*pipe.bundle.notes, *notices(pipe.bundle.text, request.negative_prompt, request.plain_prompt, joins=False))
    hints = sources.pop("controls")

    def planned(settings: dict[str, Any]) -> Plan:
        def dress(plan: Plan) -> Plan:
            return request.patches().applied(pipe, request.controls().applied(pipe, plan, hints))

        hires, folder = request.enlarged(), request.attention_maps
        whole = request.filtered().applied(pipe.bundle.model, _plan(request, pipe, prompts, settings, dict(sources)))
        whole = dress(whole) if hires is None else hires.applied(pipe, whole, dress)
        return whole if folder is None else attention_maps.recorded_in(folder, pipe, whole)

    if request.sweep:
        return compare.sweeps(request, pipe, settings, planned, target, lambda out: _values(out, pipe, 0, 0))
    watch = Watch.of(request.looking(), pipe, planned(settings), sys.stderr.isatty() and not request.quiet)
    done: list[Output] = []
    paths: list[Path] = []
    try:
        for out in request.filtered().run(pipe, watch.plan, watch.on_step):
            say(*out.notices)
            paths += _write(out, pipe, target, len(paths))
            done.append(out)
            if not request.json:
                print(*paths[-len(out.images) :], sep="\n", flush=True)
    except KeyboardInterrupt as stop:
        count = len(prompts) * request.num_images
        stop.kept = f"{len(paths)} of {count} image(s) are finished and kept in {str(target.folder)!r}"  # type: ignore[attr-defined]
        raise
    if request.grid:
        paths.append(_sheet(done, pipe, target, prompts))
        if not request.json:
            print(paths[-1])
    kept = watch.finish()
    for line in [json.dumps(_report(done, paths))] if request.json else kept:
        print(line)
    if not request.quiet:
        print(f"{_summary(done)}, {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return 0


def _sheet(done: list[Output], pipe: Pipeline, target: Target, prompts: Sequence[str]) -> Path:
    """Write all images as one contact sheet."""
    from ldm_pipe import image

    sheet = recipe.encode(image.grid([i for out in done for i in out.images]), None, target.format)
    one = {} if len(set(prompts)) == 1 else {"prompt": f"{len(prompts)} prompts"}
    return target.write(sheet, _values(done[0], pipe, 0, 0) | one, "-grid")


def _summary(done: list[Output]) -> str:
    """2 images, seeds 7 to 8."""
    count, given = sum(len(o.images) for o in done), done[0].settings
    walked = f", {done[0].walked} of {given.steps} steps" if given.strength else ""
    return f"{count} image{'s'[: count > 1]}, {_seeds([s for out in done for s in out.seeds])}{walked}"


def _seeds(seeds: list[int]) -> str:
    """seed 7; seeds 7 to 10; seeds 11, 22, 33."""
    distinct = sorted(set(seeds))
    if len(distinct) == 1:
        return f"seed {distinct[0]}"
    if distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"seeds {distinct[0]} to {distinct[-1]}"
    return f"seeds {', '.join(map(str, distinct[:6]))}{', ...' if len(distinct) > 6 else ''}"


def _sources(request: Request) -> dict[str, Any]:
    """The pictures that an edit starts from."""
    from ldm_pipe import image

    files = {n: getattr(request, n) for n in ("init_image", "mask", "input", "image_prompt")}
    found: dict[str, Any] = {n: image.read(path, f"--{n.replace('_', '-')}") for n, path in files.items() if path is not None}
    return {**found, "controls": [image.read(path, "--control-image") for path in request.control_image]}


@dataclasses.dataclass(frozen=True)
class Notes:
    """Sentences for the user on stderr, each once."""

    quiet: bool
    said: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, *texts: str) -> None:
        """Say what was not said before; empty texts are nothing."""
        for text in dict.fromkeys(texts):
            if text and text not in self.said and not self.quiet:
                print(f"note: {text}", file=sys.stderr)
            self.said.add(text)


def _report(done: list[Output], paths: list[Path]) -> dict[str, Any]:
    rows = [(prompt, seed) for out in done for prompt, seed in zip(out.prompts, out.seeds, strict=True)]
    images = [{"path": str(path), "prompt": p, "seed": s} for path, (p, s) in zip(paths, rows, strict=False)]
    evaluations = dict(sum((out.evaluations for out in done), Counter[str]()))
    notices = list(dict.fromkeys(n for out in done for n in out.notices))
    return {
        "images": images,
        "grid": str(paths[-1]) if len(paths) > len(rows) else None,
        "settings": dataclasses.asdict(done[0].settings),
        "evaluations": evaluations,
        "walked": done[0].walked,
        "notices": notices,
    }


def _write(out: Output, pipe: Pipeline, target: Target, first: int = 0) -> list[Path]:
    """Write the images of a batch, each with its recipe; `first` images of the run were written before."""
    from ldm_pipe.replay import recipe_of

    return [
        target.write(recipe.encode(picture, recipe_of(out, pipe, k), target.format), _values(out, pipe, k, first + k))
        for k, picture in enumerate(out.images)
    ]


def _values(out: Output, pipe: Pipeline, k: int, index: int) -> dict[str, object]:
    """What stands for the fields of a templated name."""
    s = out.settings
    return {
        "prompt": out.prompts[k], "seed": out.seeds[k], "index": index + 1, "sampler": s.sampler, "spacing": s.spacing,
        "steps": s.steps, "scale": s.guidance_scale, "width": s.width, "height": s.height, "model": pipe.name,
    }  # fmt: skip


def _replay(request: Request, path: str) -> int:
    """Make an image again from its file; exit 1 where --verify finds a difference."""
    found = recipe.read(path)
    if request.model == "builtin" != found.model:  # a file may not choose which folder is loaded
        raise UsageError(f"{path!r} was made by the model {found.model!r:.60}; give its folder with --model")
    target = Target.of(request.output, 1, request.force)
    from ldm_pipe import replay

    Settings(**replay.settings_of(found))  # what is wrong with it is said before a model is loaded
    from ldm_pipe.pipeline import Pipeline

    dtype = DTYPES.get(found.dtype, "auto") if request.dtype == "auto" else request.dtype
    attention = found.attention if request.attention == "auto" and found.attention in ATTENTIONS else request.attention
    say = Notes(request.quiet)
    if found.partial:
        say(f"the image was made by a model whose tensors did not all fit, under --allow-partial: {found.lacking()}")
    pipe = Pipeline.from_pretrained(request.model, request.device, dtype, attention, **request.loading())
    say(*pipe.bundle.notes)
    pipe = request.adapters().again(found.adapters).applied(pipe)
    out = replay.again(found, pipe, _sources(request), request.controls())
    if not request.verify:
        print(*_write(out, pipe, target), sep="\n")
        return 0
    verdict = replay.verify(path, found, out, pipe)
    print(f"{path}: {verdict}")
    return 0 if verdict.largest == 0 else 1


def _plan(request: Request, pipe: Pipeline, prompts: Sequence[str], settings: dict[str, Any], sources: dict[str, Any]) -> Plan:
    """The plan of the run, with what --edit, --restore and --image-prompt make of it."""
    restoration, picture = request.restored(), sources.pop("input", None)
    shown, seen = request.pictured(), sources.pop("image_prompt", None)
    if request.edit is not None:
        return request.edited().plan(pipe, picture, **sources, **settings)
    if restoration is not None:
        return restoration.plan(pipe, prompts, picture, **settings)
    inpainting = request.inpainted()
    if inpainting is not None:
        whole = inpainting.plan(pipe, prompts, sources["init_image"], sources.get("mask"), **settings)
    else:
        whole = pipe.plan(prompts, None, **sources, **settings)
    return whole if shown is None else shown.applied(pipe, whole, seen)
