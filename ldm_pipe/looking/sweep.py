"""The same images under many settings, from the same noise: one contact sheet, a row for each setting, and one JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan

MOST_PIXELS, LETTER = 100_000_000, 12


@dataclass(frozen=True)
class Row:
    """One setting of a sweep: its label, what was run, the images, and seconds of the whole run."""

    label: str
    output: Output
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """What the JSON file says of it. evaluations: images the network saw, over all branches."""
        s, count = self.output.settings, len(self.output.images)
        names = ("sampler", "spacing", "steps", "guidance_scale", "strength", "sampler_set", "spacing_set")
        seen = sum(self.output.evaluations.values())
        took = {"seconds": round(self.seconds, 3), "evaluations": seen, "evaluations_per_image": seen / count}
        return {"label": self.label, **{n: getattr(s, n) for n in names}, **took}


def run(pipe: Pipeline, plans: Iterable[tuple[str, Callable[[], Plan]]]) -> Iterator[Row]:
    """Run every plan; its images must have the same seeds and prompts as those of the first."""
    from ldm_pipe.pipeline import Output

    rows = None
    for label, make in plans:
        plan = make()
        if rows not in (None, plan.rows):
            raise UsageError("a sweep compares the same prompts and seeds")
        rows, started = plan.rows, time.perf_counter()
        output = Output.joined(list(pipe.run(plan)))
        yield Row(label, output, time.perf_counter() - started)


def sheet(rows: list[Row]) -> Image:
    """A row of images for each setting, its label to the left. Raises UsageError where that would be too large a picture."""
    from PIL import Image as Picture
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(LETTER)
    margin = 8 + max(int(font.getlength(row.label)) for row in rows)
    w, h = rows[0].output.images[0].size
    tall, count = max(h, LETTER + 4), len(rows[0].output.images)
    size = (margin + count * (w + 2), len(rows) * (tall + 2) - 2)
    if size[0] * size[1] > MOST_PIXELS:
        raise UsageError(f"the sheet of the sweep would have {size[0]}x{size[1]} pixels; take fewer or smaller images")
    made = Picture.new("RGB", size, "white")
    draw = ImageDraw.Draw(made)
    for k, row in enumerate(rows):
        top = k * (tall + 2)
        draw.text((4, top + tall // 2), row.label, fill="black", font=font, anchor="lm")
        for i, picture in enumerate(row.output.images):
            made.paste(picture, (margin + i * (w + 2), top))
    return made


def report(rows: list[Row]) -> bytes:
    """The JSON file: what all rows share, and a list of what they do not."""
    first = rows[0].output
    shared = {"prompts": first.prompts, "seeds": first.seeds, "size": [first.settings.width, first.settings.height]}
    return (json.dumps({**shared, "rows": [row.facts for row in rows]}, indent=1) + "\n").encode()
