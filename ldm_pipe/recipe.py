"""The recipe of an image, inside the image: everything needed to make it again, as JSON in one iTXt key of a PNG or in the
EXIF description of a JPEG or WebP.

Beside it stands the text that other tools read (`parameters` in a PNG, the EXIF user comment elsewhere). What is read back is
untrusted: size-capped, built strictly.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

KEY, FORMAT, LIMIT = "ldm_pipe", 1, 1_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
WANTED = "it is not a PNG, JPEG or WebP file"
DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286
EXIF_LIMIT = 55_000  # characters; an EXIF block of a JPEG ends at 64 kB


@dataclass(frozen=True)
class Recipe:
    """What made one image. seed: the image's own; batch, row: how many were computed together, and which this one was.

    sources: SHA-256 of the pixels an edit started from. edit, restoration: the fields of the `Edit` or the `Restoration` it
    was. hires: of the second pass; height and width are the first's. filtered: the share of images that was kept.
    image_prompt: how a picture stood beside the words. controls, adapters: name, digest and settings of each. patches: as
    --patch takes them, those of `speed` among them.
    partial: the tensors that its model's files lacked or had too many, a row for each part and fault. tile: the side in latent
    pixels of the tiles it was decoded in, 0 for none.
    digests: SHA-256 of the weight files that were checked on load; versions: of the libraries; threads: of the CPU.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    steps: int = 1
    strength: float | None = None
    guidance_scale: float | None = None
    guide: str | None = None
    sampler: str = ""
    spacing: str = ""
    sampler_set: dict[str, Any] = field(default_factory=dict)
    spacing_set: dict[str, Any] = field(default_factory=dict)
    height: int = 0
    width: int = 0
    batch: int = 1
    row: int = 0
    sources: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    restoration: dict[str, Any] = field(default_factory=dict)
    hires: dict[str, Any] = field(default_factory=dict)
    image_prompt: dict[str, Any] = field(default_factory=dict)
    controls: tuple[dict[str, Any], ...] = ()
    adapters: tuple[dict[str, Any], ...] = ()
    filtered: dict[str, Any] = field(default_factory=dict)
    patches: tuple[str, ...] = ()
    speed: str = ""
    plain_prompt: bool = True  # as prompts were read before there was a grammar
    model: str = "builtin"
    partial: tuple[dict[str, Any], ...] = ()
    tile: int = 0
    digests: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    dtype: str = "fp32"
    attention: str = "sdpa"
    threads: int = 1
    versions: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if not (1 <= self.batch <= 4096 and 0 <= self.row < self.batch):
            raise UsageError(f"a recipe has 1 to 4096 images in its batch and a row in it, got {self.batch} and {self.row}")
        if not 0 <= self.tile <= 2**16:
            raise UsageError(f"a recipe has tiles of 0 to {2**16} latent pixels, got {self.tile}")

    def differences(self, other: Recipe) -> list[str]:
        """The recorded facts of the machine and the software in which two recipes differ, as "name: ours -> theirs"."""
        found = []
        for name in ("device", "dtype", "attention", "threads", "batch", "row", "tile", "model"):
            mine, theirs = getattr(self, name), getattr(other, name)
            found += [f"{name}: {mine} -> {theirs}"] if mine != theirs else []
        mine, theirs = self.lacking(parts=False), other.lacking(parts=False)
        found += [f"tensors that did not fit: {mine or 'none'} -> {theirs or 'none'}"] if mine != theirs else []
        for group in ("versions", "digests"):
            ours, others = getattr(self, group), getattr(other, group)
            names = sorted({*ours, *others})
            found += [f"{n}: {_short(ours.get(n))} -> {_short(others.get(n))}" for n in names if ours.get(n) != others.get(n)]
        return found

    def lacking(self, parts: bool = True) -> str:
        """Which tensors of the model were missing or did not fit (--allow-partial), "" where it was loaded whole. parts: say of
        which part of which folder, too."""
        said = []
        for row in self.partial:
            first, count = row.get("first"), row.get("count")
            names = ", ".join(str(n)[:100] for n in first) if isinstance(first, list | tuple) else ""
            more = ", ..." if isinstance(first, list | tuple) and count != len(first) else ""
            place = f" in {str(row.get('part'))[:100]}" if parts else ""
            said.append(f"{str(count)[:20]} {str(row.get('fault'))[:20]}{place} ({names}{more})")
        return "; ".join(said)

    def summary(self) -> str:
        """What a person wants to know first, a fact a line."""
        rows = {"prompt": self.prompt, "negative prompt": self.negative_prompt, "seed": self.seed, "steps": self.steps}
        rows |= {"strength": self.strength, "sampler": self._with(self.sampler, self.sampler_set)}
        rows |= {"spacing": self._with(self.spacing, self.spacing_set), "guidance": self.guide or self.guidance_scale}
        rows |= {"edit": self.edit and f"{self.edit.get('source')} -> {self.edit.get('target')}"} if self.edit else {}
        rows |= {"restored": " by ".join(str(v) for k, v in self.restoration.items() if k in ("operator", "method"))}
        rows |= {"enlarged": f"{self.hires.get('factor')}x, strength {self.hires.get('strength')}"} if self.hires else {}
        rows |= {"controls": ", ".join(f"{c.get('name')} x{c.get('scale')}" for c in self.controls)}
        rows |= {"adapters": ", ".join(f"{a.get('name')} {a.get('scale', a.get('word'))}".strip() for a in self.adapters)}
        rows |= {"patches": ", ".join(self.patches) + (f" (--speed {self.speed})" if self.speed else "")}
        rows |= {"partial load": self.lacking(), "decoded": f"in tiles of {self.tile} latent pixels" if self.tile else ""}
        rows |= {"size": f"{self.width}x{self.height}", "model": self.model, "made with": f"{self.dtype} on {self.device}"}
        return "\n".join(f"{name + ':':<17}{value}" for name, value in rows.items() if value not in (None, ""))

    @staticmethod
    def _with(name: str, fields: Mapping[str, Any]) -> str:
        return name + "".join(f", {k}={v}" for k, v in fields.items())

    def parameters(self) -> str:
        """The text that AUTOMATIC1111 writes and other tools read. A line break in a prompt is a space there."""
        lines = [" ".join(self.prompt.split())]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {' '.join(self.negative_prompt.split())}")
        facts = {"Steps": self.steps, "Sampler": self.sampler, "Schedule type": self.spacing}
        facts |= {"CFG scale": self.guidance_scale} if self.guide is None else {"Guide": f'"{" ".join(self.guide.split())}"'}
        facts |= {} if self.strength is None else {"Denoising strength": self.strength}
        facts |= {"Seed": self.seed, "Size": f"{self.width}x{self.height}", "Model": self.model, "Version": "ldm_pipe"}
        return "\n".join([*lines, ", ".join(f"{k}: {v}" for k, v in facts.items())])


def _short(value: Any) -> str:
    return str(value)[:12]


def encode(image: Image, recipe: Recipe | None, format: str = "PNG") -> bytes:
    """An image file ("PNG", lossless "WEBP" or "JPEG" of quality 95), with its recipe."""
    out = io.BytesIO()
    if format == "PNG":
        image.save(out, format, pnginfo=_png_text(recipe))
    else:
        options = {"lossless": True} if format == "WEBP" else {"quality": 95, "subsampling": 0}
        image.save(out, format, exif=_exif(recipe), **options)
    return out.getvalue()


def check_fits(prompts: Iterable[str], negative: str, format: str) -> None:
    """Raises UsageError where a prompt is too long for the EXIF block of a JPEG, before anything is computed."""
    if format == "JPEG" and max(len(json.dumps(p)) + 2 * len(p) for p in prompts) + len(json.dumps(negative)) * 3 > EXIF_LIMIT:
        raise UsageError("--output: a prompt this long does not fit into a JPEG file with its recipe; give a .png name")


def _json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), ensure_ascii=True, allow_nan=False)


def _png_text(recipe: Recipe | None) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if recipe is not None:
        info.add_itxt(KEY, _json(recipe))
        info.add_itxt("parameters", recipe.parameters().encode("utf-8", "replace").decode("utf-8").replace("\0", " "))
    return info


def _exif(recipe: Recipe | None) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    if recipe is not None:
        exif[DESCRIPTION] = _json(recipe)
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = b"UNICODE\0" + recipe.parameters().encode("utf-16-be", "replace")
    return exif.tobytes()


def read(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in an image file. Raises UsageError where there is none or it is not of the form."""
    text = _text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r}: its recipe is not JSON") from error
    if not isinstance(found, Mapping):
        raise UsageError(f"{str(path)!r}: its recipe is not an object")
    if found.get("format") != FORMAT:
        raise UsageError(f"{str(path)!r}: its recipe has format {found.get('format')!r:.20}; this version reads {FORMAT}")
    return strict.build(Recipe, found, f"recipe of {str(path)!r}")


def _text(path: str | os.PathLike[str]) -> str:
    from PIL import Image

    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device would be waited for
        raise UsageError(f"{str(path)!r} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a decompression bomb is a warning before it is an error
            with Image.open(path, formats=FORMATS) as image:
                text = image.info.get(KEY) if image.format == "PNG" else image.getexif().get(DESCRIPTION)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read as an image: {error.strerror or WANTED}") from error
    except (ValueError, SyntaxError, Warning) as error:
        raise UsageError(f"{str(path)!r} cannot be read as an image: {str(error)[:80]}") from error
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        why = "it was not made by generate, or saved again since, or is a contact sheet"
        raise UsageError(f"{str(path)!r} holds no recipe: {why}")
    if len(text) > LIMIT:
        raise UsageError(f"{str(path)!r}: its recipe is longer than {LIMIT} characters")
    return text
