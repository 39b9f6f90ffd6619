"""`--attention-maps DIR`: beside every image a sheet that shows where it looks at each word of its prompt."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import files
from ldm_pipe.errors import UsageError
from ldm_pipe.grammar import FIRST, parse

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

CAPTION = 12  # pixels under a map


def recorded_in(folder: str, pipe: Pipeline, whole: Plan) -> Plan:
    """The plan that also writes a sheet into a folder for each image, {number}-{seed}.png. No image changes by a bit.

    Raises UsageError where the folder is a file, or where the words of the text encoder cannot be told apart.
    """
    from ldm_pipe.analysis.attention_maps import AttentionMaps, of_words
    from ldm_pipe.image import grid, to_pil
    from ldm_pipe.patch import root

    readers = _readers(pipe.bundle.text)
    watch, done, earlier = AttentionMaps(root(pipe.bundle.model), whole.shape[1:]), [0], whole.report

    def report(images: Tensor) -> str:
        pictures, maps = to_pil(images), watch.maps().float()
        for picture, found in zip(pictures, maps, strict=True):
            prompt, seed = whole.rows[done[0]]
            words = of_words(found, _spans(readers, _said(prompt, whole.given.plain_prompt), len(found)))
            lit = [_captioned(_lit(picture, m), word.split(" ")[1]) for word, m in words.items()]
            done[0] += 1
            out = io.BytesIO()
            grid([_captioned(picture, ""), *lit]).save(out, "PNG")
            files.write(Path(folder) / f"{done[0]:03}-{seed}.png", out.getvalue(), replace=True)
        said = f"{len(pictures)} sheet(s) of attention maps are in {folder!r}"
        return said if earlier is None else f"{earlier(images)}; {said}"

    return replace(whole, guides=(watch, *whole.guides), report=report)


def check_folder(folder: str | None) -> None:
    """Raises UsageError where a file stands in the place of the folder, or of one that it is to be in."""
    path = Path(folder or ".")
    there = next((p for p in (path, *path.parents) if p.exists()), path)
    if there.exists() and not there.is_dir():
        raise UsageError(f"--attention-maps takes a folder; {str(there)!r} is a file")


def _readers(text: Any) -> list[Any]:
    """The encoders whose tokens the network attends to, in order: a CLIP or T5, or CLIP and behind it T5. Two CLIPs side by
    side have their words in the same places."""
    if hasattr(text, "tokenizer"):
        return [text]
    clips, t5 = getattr(text, "clips", getattr(text, "towers", ())), getattr(text, "t5", None)
    if not clips and t5 is None:
        raise UsageError("--attention-maps needs a model whose text encoders are CLIP or T5")
    return [*clips[:1], *([t5] if t5 else [])]


def _said(prompt: str, plain: bool) -> Any:
    """What the encoders read of a prompt at its first step, of the parts that AND joins the first."""
    return prompt if plain else parse(prompt).branches[0].at(*FIRST)


def _spans(readers: list[Any], prompt: Any, count: int) -> dict[str, list[int]]:
    """The words of a prompt, "3 word" for one, each with its places among `count` tokens, in all windows of a CLIP; no signs,
    nor what is cut off."""
    found: dict[str, list[int]] = {}
    for number, reader in enumerate(readers):
        first = count - reader.window if number else 0  # the last ones are T5's, however many windows CLIP took
        for k, (word, span) in enumerate(reader.places(prompt)):
            if len(span) and any(c.isalnum() for c in word):
                found.setdefault(f"{k} {word}", []).extend(first + i for i in span)
    return found


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
