"""The families of models that load: which classes their folders name, which file of `networks/` puts them together.

A new family is one file in `networks/` with an `assemble(parts)`, and one row here. No class outside this table is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm_pipe.errors import ModelError


@dataclass(frozen=True)
class Defaults:
    """What a model is best run with where the user says nothing.

    size: (width, height) in pixels. spacing_set: fields of the spacing. area_shift: (low, high, least, most) where the shift of
    a flow grows with the area, e^low at `least` patches of the image to e^high at `most`; empty elsewhere.
    """

    size: tuple[int, int] = (512, 512)
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "dpm2m"
    spacing: str = "leading"
    spacing_set: dict[str, Any] = field(default_factory=dict)
    area_shift: tuple[float, ...] = ()
    words: tuple[str, ...] = ()


Classes = tuple[str | None, ...]


@dataclass(frozen=True)
class Family:
    """One kind of model. module: its file in `networks/`; parts: for every part the classes that model_index.json may name
    ("library.Class"; None: the part may be left out)."""

    title: str
    module: str
    parts: Mapping[str, Classes]
    defaults: Defaults = Defaults()


NONE: Classes = (None,)
UNET: Classes = ("diffusers.UNet2DConditionModel",)
KL: Classes = ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny")
CLIP: Classes = ("transformers.CLIPTextModel",)
OPEN_CLIP: Classes = ("transformers.CLIPTextModelWithProjection",)
T5: Classes = ("transformers.T5EncoderModel",)
CLIP_WORDS: Classes = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
T5_WORDS: Classes = ("transformers.T5Tokenizer", "transformers.T5TokenizerFast")
ONE_CLIP = {"text_encoder": CLIP, "tokenizer": CLIP_WORDS, "vae": KL}
PAIR = {"text_encoder_2": OPEN_CLIP, "tokenizer_2": CLIP_WORDS, "vae": KL}
FLOW: dict[str, Any] = {"sampler": "euler", "spacing": "flow"}

FAMILIES: dict[str, Family] = {
    "sd": Family("Stable Diffusion 1 and 2", "unet", {"unet": UNET, **ONE_CLIP, "text_encoder_2": NONE, "image_encoder": NONE}),
    "unclip": Family(
        "Stable Diffusion 2 with pictures (unCLIP)", "unclip",
        {"unet": UNET, **ONE_CLIP, "image_encoder": ("transformers.CLIPVisionModelWithProjection",),
         "image_normalizer": ("stable_diffusion.StableUnCLIPImageNormalizer",),
         "image_noising_scheduler": ("diffusers.DDPMScheduler",), "prior": NONE},
        Defaults(size=(768, 768), guidance_scale=10.0),
    ),
    "sdxl": Family(
        "Stable Diffusion XL", "sdxl", {"unet": UNET, "text_encoder": CLIP, "tokenizer": CLIP_WORDS, **PAIR},
        Defaults(size=(1024, 1024), guidance_scale=5.0),
    ),
    "sdxl-refiner": Family(
        "Stable Diffusion XL, the refiner", "sdxl", {"unet": UNET, "text_encoder": NONE, "tokenizer": NONE, **PAIR},
        Defaults(size=(1024, 1024), guidance_scale=5.0),
    ),
    "sd3": Family(
        "Stable Diffusion 3 and 3.5", "sd3",
        {"transformer": ("diffusers.SD3Transformer2DModel",), "text_encoder": OPEN_CLIP, "tokenizer": CLIP_WORDS, **PAIR,
         "text_encoder_3": (*T5, None), "tokenizer_3": (*T5_WORDS, None)},
        Defaults(size=(1024, 1024), steps=28, guidance_scale=7.0, **FLOW),
    ),
    "flux": Family(
        "Flux", "flux",
        {"transformer": ("diffusers.FluxTransformer2DModel",), **ONE_CLIP, "text_encoder_2": T5, "tokenizer_2": T5_WORDS},
        Defaults(size=(1024, 1024), steps=28, guidance_scale=3.5, spacing_set={"base": "trailing"}, **FLOW),
    ),
    "pixart": Family(
        "PixArt-alpha and -sigma", "pixart",
        {"transformer": ("diffusers.PixArtTransformer2DModel", "diffusers.Transformer2DModel"), "text_encoder": (*T5, *CLIP),
         "tokenizer": (*T5_WORDS, *CLIP_WORDS), "vae": KL},
        Defaults(size=(1024, 1024), steps=20, guidance_scale=4.5),
    ),
    "sana": Family(
        "Sana", "sana",
        {"transformer": ("diffusers.SanaTransformer2DModel",), "vae": ("diffusers.AutoencoderDC",),
         "text_encoder": ("transformers.Gemma2Model",),
         "tokenizer": ("transformers.GemmaTokenizer", "transformers.GemmaTokenizerFast")},
        Defaults(size=(1024, 1024), steps=20, guidance_scale=4.5, **FLOW),
    ),
    "dit": Family(
        "DiT, by class", "dit",
        {"transformer": ("diffusers.DiTTransformer2DModel", "diffusers.Transformer2DModel"), "vae": KL, "text_encoder": NONE},
        Defaults(size=(256, 256), steps=25, guidance_scale=4.0),
    ),
}  # fmt: skip


def encoders(family: str) -> list[str]:
    """The folders of a family's text encoders, in their order."""
    return [part for part, classes in FAMILIES[family].parts.items() if part.startswith("text_encoder") and classes != NONE]


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The "library.Class" that an index names for a part, None where it names none. Anything else comes back as its repr."""
    value = index.get(part)
    if value is None or value in ([None, None], (None, None)):
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, str) for v in value):
        return ".".join(value)
    return repr(value)[:80]


def family_of(index: Mapping[str, Any], where: str) -> str:
    """The name of the family of a model_index.json. Raises ModelError that names the first part which does not fit the family
    that comes nearest."""
    best, faults = "", {}
    for name, family in FAMILIES.items():
        faults[name] = [part for part, classes in family.parts.items() if class_of(index, part) not in classes]
        if not faults[name]:
            return name
        first = next(iter(family.parts))
        known = class_of(index, first) in family.parts[first] or first in index
        if known and (not best or len(faults[name]) < len(faults[best])):
            best = name
    best = best or "sd"
    part = faults[best][0]
    allowed = " or ".join(str(c.split(".") if c else None) for c in FAMILIES[best].parts[part])
    given = index.get(part)
    raise ModelError(f"{where}: {part} is {given!r:.80}; it takes {allowed} ({FAMILIES[best].title})")
