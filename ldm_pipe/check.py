"""`generate --check`: what a model is, read as strictly as for a run: family, sizes, types and digests of its files, and what
an image of the asked size will take."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import hub
from ldm_pipe.errors import UsageError
from ldm_pipe.families import FAMILIES
from ldm_pipe.files import sha256

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.request import Request


def examine(request: Request) -> int:
    """Load a model, say what was found, one fact a line (--json: one object), and sample nothing. The exit code."""
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import resolve
    from ldm_pipe.settings import Settings

    if request.prompts:
        raise UsageError("--check samples nothing; --prompts does not go with it")
    prompts = request.texts()[0] if request.prompt else ()
    pipe = Pipeline.from_pretrained(request.model, request.device, request.dtype, request.attention, **request.loading())
    given = resolve(pipe.bundle, Settings(height=request.height, width=request.width, steps=request.steps))
    found = facts(pipe, int(given.height or 0), int(given.width or 0), int(given.steps or 0))
    found["files"] = dict(files_of(request.model))
    found["prompts"] = [read(pipe, prompt, request.plain_prompt) for prompt in prompts]
    print(json.dumps(found) if request.json else "\n".join(lines(found)))
    return 0


def facts(pipe: Pipeline, height: int, width: int, steps: int) -> dict[str, Any]:
    """What a loaded model is, and what an image takes: bytes of memory, and seconds, scaled by the area from a small image."""
    from ldm_pipe.offload import modules
    from ldm_pipe.one_step import contradiction

    b, image = pipe.bundle, {"width": width, "height": height, "steps": steps}
    parts = {"network": b.model, "codec": b.codec, "text": b.text}
    return {
        "model": pipe.name,
        "family": b.family,
        "title": FAMILIES[b.family].title,
        "prediction": b.model.prediction.name,
        "contradiction": contradiction(b.model.prediction.name, b.predicts(), "scheduler/scheduler_config.json"),
        "path": type(b.model.path).__name__,
        "notes": list(b.notes),
        "parameters": {n: sum(p.numel() for m in modules(part) for p in m.parameters()) for n, part in parts.items()},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "latents": f"{b.codec.channels} channels, {b.codec.factor} pixels to one",
        "multiple": b.multiple,
        "takes": {"masked": "a picture and a mask", "picture": "a picture"}.get(b.inserts or "", "text"),
        "defaults": {n: v for n, v in dataclasses.asdict(b.defaults).items() if n != "words"},
        "image": image
        | {"bytes": pipe.forecast(height, width), "seconds": round(_seconds(pipe, height, width) * steps, 1)}
        | {"decoder": pipe.forecast_decoding(height, width)},
    }


def read(pipe: Pipeline, prompt: str, plain: bool) -> dict[str, Any]:
    """How a prompt is read: its parts with their weights as numbers, the windows of the encoder that each takes, and notes."""
    from ldm_pipe.grammar import FIRST, parse, written
    from ldm_pipe.prompt import Prompt
    from ldm_pipe.wording import notices, reads

    text = pipe.bundle.text
    if not reads(text, plain):
        return {"prompt": prompt, "parts": [prompt], "windows": [1], "notes": text.notices(prompt)}
    found = parse(prompt)
    parts = [written(Prompt((branch,))) for branch in found.branches]
    windows = [text.chunks(branch.at(*FIRST)) for branch in found.branches]
    return {"prompt": prompt, "parts": parts, "windows": windows, "notes": notices(text, prompt, plain)}


def _seconds(pipe: Pipeline, height: int, width: int) -> float:
    """Of one step under guidance, scaled by the area from one of 16 latent pixels a side."""
    import torch

    from ldm_pipe.level import Level

    b, side = pipe.bundle, 16
    cond, x = b.empty(side), torch.zeros(1, b.codec.channels, side, side, device=pipe.device)
    with torch.no_grad():
        b.model(x, Level(0.5, 0.5), cond)
        started = time.perf_counter()
        b.model(x, Level(0.5, 0.5), cond)
    took = time.perf_counter() - started
    return (1 if b.embeds else 2) * took * height * width / (side * b.codec.factor) ** 2


def files_of(model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name in the model, bytes, SHA-256, tensors by type) of every weight file."""
    from ldm_pipe import weights
    from ldm_pipe.loading import BUILTIN

    place = BUILTIN if model == "builtin" else hub.fetch(model) if hub.names(model) else Path(model)
    for file in [place] if place.is_file() else sorted(place.glob("*/*.safetensors")):
        kinds = Counter(dtype for dtype, _ in weights.header(file, alone=True).values())
        name = file.name if file == place else str(file.relative_to(place))
        yield name, {"bytes": file.stat().st_size, "sha256": sha256(file), "tensors": dict(kinds)}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The facts for a reader."""
    counts, image, d = found["parameters"], found["image"], found["defaults"]
    loaded = "loaded with warnings" if found["notes"] else "loaded whole and finite"
    yield f"{found['model']}: {found['title']} ({found['family']}), {loaded}"
    yield f"predicts {found['prediction']} on {found['path']}; takes {found['takes']}"
    for text in filter(None, (found["contradiction"], *found["notes"])):
        yield f"warning: {text}"
    yield "parameters: " + ", ".join(f"{n} {c:,}" for n, c in counts.items()) + f", in {found['dtype']}"
    yield f"latents: {found['latents']}; sides are multiples of {found['multiple']}"
    size = "x".join(map(str, d["size"]))
    yield f"defaults: {size}, {d['steps']} steps, scale {d['guidance_scale']}, {d['sampler']}, {d['spacing']}"
    for name, file in found["files"].items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in file["tensors"].items())
        yield f"{name}: {file['bytes']:,} bytes, {kinds}, sha256 {file['sha256']}"
    for prompt in found.get("prompts", ()):
        for part, windows in zip(prompt["parts"], prompt["windows"], strict=True):
            yield f"prompt: {part!r:.400}, {windows} window(s) of the text encoder"
        yield from (f"note: {note}" for note in prompt["notes"])
    needs = f"about {image['bytes'] / 2**20:,.0f} MiB beside the weights and {image['seconds']:g} s"
    yield f"an image of {image['width']}x{image['height']} in {image['steps']} steps: {needs}"
    yield f"its decoder: about {image['decoder']['bytes'] / 2**20:,.0f} MiB, so it is decoded {image['decoder']['how']}"
