"""The flags of `generate` as fields: what may be given, what stands where nothing is, and which go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SETTINGS = (
    "negative_prompt", "seed", "steps", "guidance_scale", "guide", "sampler", "spacing", "num_images", "height", "width",
    "batch_size", "strength", "plain_prompt",
)  # fmt: skip
LOADING = ("offload", "allow_partial", "tokenizer", "text_encoder")
WITH_SHOW = ("show", "json", "quiet", "debug", "model", "device", "dtype", "attention", *LOADING)
FILES = ("init_image", "mask", "input", "image_prompt", "control", "control_image", "lora", "embedding")
WITH_REPLAY = ("replay", "verify", "output", "force", *FILES, *WITH_SHOW[1:])


@dataclass(frozen=True)
class Flags:
    """The flags of `generate`, which are also the keys of a --config file. None: the model's default."""

    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    negative_prompt: str = ""
    plain_prompt: bool = False
    model: str = "builtin"
    output: str | None = None
    num_images: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guide: str | None = None
    sampler: str | None = None
    spacing: str | None = None
    set: tuple[str, ...] = ()
    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    init_image: str | None = None
    mask: str | None = None
    outpaint: str | None = None
    strength: float | None = None
    edit: str | None = None
    image_prompt: str | None = None
    noise_level: int | None = None
    control: tuple[str, ...] = ()
    control_image: tuple[str, ...] = ()
    control_scale: tuple[float, ...] = ()
    lora: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    attention_maps: str | None = None
    hires: str | None = None
    filter_hallucinations: float | None = None
    patch: tuple[str, ...] = ()
    speed: str | None = None
    restore: str | None = None
    input: str | None = None
    method: str | None = None
    dtype: str = "auto"
    attention: str = "auto"
    device: str = "auto"
    offload: str = "none"
    allow_partial: bool = False
    tokenizer: str | None = None
    text_encoder: str | None = None
    grid: bool = False
    force: bool = False
    json: bool = False
    quiet: bool = False
    debug: bool = False
    verify: bool = False
    list: str | None = None
    record: str | None = None
    preview: str | None = None
    preview_decoder: str | None = None
    sweep: tuple[str, ...] = ()
    doctor: bool = False
    check: bool = False
    show: str | None = None
    replay: str | None = None

    def loading(self) -> dict[str, Any]:
        """How the model is to be loaded: keywords of `Pipeline.from_pretrained`."""
        return {name: getattr(self, name) for name in LOADING}
