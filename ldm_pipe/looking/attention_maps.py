"""`--attention-maps DIR`: beside every image a sheet that shows where it looks at each word of its prompt."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import files
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

CAPTION = 12  # pixels under a map


def recorded_in(folder: str, pipe: Pipeline, whole: Plan) -> Plan:
    """The plan that also writes a sheet into a folder for each image, {number}-{seed}.png. No image changes by a bit.

    Raises UsageError where the text is not that of one CLIP, whose words can be told apart.
    """
    from ldm_pipe.analysis.attention_maps import AttentionMaps, of_words
    from ldm_pipe.image import grid, to_pil
    from ldm_pipe.patch import root

    text: Any = pipe.bundle.text
    if not (hasattr(text, "tokenizer") and hasattr(text, "window")):
        raise UsageError("--attention-maps needs a model whose text encoder is one CLIP")
    watch, done, earlier = AttentionMaps(root(pipe.bundle.model), whole.shape[1:]), [0], whole.report

    def report(images: Tensor) -> str:
        pictures, maps = to_pil(images), watch.maps().float()
        for picture, found in zip(pictures, maps, strict=True):
            prompt, seed = whole.rows[done[0]]
            words = of_words(found, _spans(text.tokenizer, text.window, prompt))
            lit = [_captioned(_lit(picture, m), word.split(" ")[1]) for word, m in words.items()]
            done[0] += 1
            out = io.BytesIO()
            grid([_captioned(picture, ""), *lit]).save(out, "PNG")
            files.write(Path(folder) / f"{done[0]:03}-{seed}.png", out.getvalue(), replace=True)
        said = f"{len(pictures)} sheet(s) of attention maps are in {folder!r}"
        return said if earlier is None else f"{earlier(images)}; {said}"

    return replace(whole, guides=(watch, *whole.guides), report=report)


def _spans(tokenizer: Any, window: int, prompt: str) -> dict[str, range]:
    """The words of a prompt, "3 word" for one, each with its places among the tokens; no signs, nor what the window cuts."""
    from ldm_pipe.tokens import places

    found = enumerate(places(tokenizer, window, prompt))
    return {f"{k} {word}": span for k, (word, span) in found if len(span) and any(c.isalnum() for c in word)}


def _lit(picture: Image, shown: Tensor) -> Image:
    """A picture in grey, lit where a map [h,w] in 0..1 is high."""
    from PIL import Image, ImageOps

    grey = Image.fromarray((shown * 255).round().byte().cpu().numpy()).resize(picture.size, Image.Resampling.BICUBIC)
    dark = ImageOps.grayscale(picture).point(lambda value: value // 3).convert("RGB")
    return Image.composite(Image.new("RGB", picture.size, (255, 200, 60)), dark, grey.point(lambda value: value * 4 // 5))


def _captioned(picture: Image, word: str) -> Image:
    from PIL import Image, ImageDraw

    tile = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    tile.paste(picture)
    ImageDraw.Draw(tile).text((2, picture.height), word, fill="black")
    return tile
