"""The settings of one run: the fields are the flags of `generate`, the keywords of `Pipeline` and its TOML."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ldm_pipe.errors import UsageError, unknown

LARGEST_SIDE = 16_384
ATTENTIONS = ("auto", "sdpa", "math", "xformers", "fast")
DTYPES = ("auto", "fp32", "bf16", "fp16")
OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class Settings:
    """What to make. None means the model's own default.

    strength: with an init image, the share of the walk that is run, above 0 to 1 = all of it.
    seed: of the first image of every prompt, 0..2^64 - 1 (image k has seed + k); None draws one. seeds: one for each prompt
    instead. steps: of the walk. guidance_scale: of classifier-free guidance, 1 = none. guide: a rule instead, such as
    "cfg(5) | between(0.2, 0.9)". sampler, spacing: registered names; sampler_set, spacing_set: their fields. num_images: per
    prompt. height, width: pixels. batch_size: images computed together. plain_prompt: brackets, AND and BREAK in prompts are
    text, and what lies beyond the encoder's window is not seen.
    """

    negative_prompt: str = ""
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guide: str | None = None
    sampler: str | None = None
    spacing: str | None = None
    sampler_set: dict[str, Any] = field(default_factory=dict)
    spacing_set: dict[str, Any] = field(default_factory=dict)
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    batch_size: int = 16
    strength: float | None = None
    plain_prompt: bool = False

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, 10_000)
        _whole("num_images", self.num_images, 1, 100_000)
        _whole("batch_size", self.batch_size, 1, 4096)
        _whole("height", self.height, 1, LARGEST_SIDE)
        _whole("width", self.width, 1, LARGEST_SIDE)
        for seed in (self.seed, *(self.seeds or ())):
            _whole("seed", seed, 0, 2**64 - 1)
        if self.strength is not None and not (_number(self.strength) and 0 < self.strength <= 1):
            raise UsageError(f"strength is {self.strength!r}; it takes a number above 0, at most 1 = all noise")
        scale = self.guidance_scale
        if scale is not None and not _number(scale):
            raise UsageError(f"guidance_scale is {scale!r}; it takes a finite number, 1 = no guidance")


def check_device(name: str) -> None:
    """Raises UsageError where a text names no device: auto, cpu, cuda, cuda:1."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise UsageError(f"--device {name!r} is not a device; choose from auto, cpu, cuda, cuda:N")


def check_dtype(name: str) -> None:
    """Raises UsageError where a text names no dtype."""
    if name not in DTYPES:
        raise UsageError("--dtype " + unknown("dtype", name, DTYPES))


def check_attention(name: str) -> None:
    """Raises UsageError where a text names no backend of attention."""
    if name not in ATTENTIONS:
        raise UsageError("--attention " + unknown("backend", name, ATTENTIONS))


def check_offload(name: str) -> None:
    """Raises UsageError where a text names no way of keeping weights on the CPU."""
    if name not in OFFLOADS:
        raise UsageError("--offload " + unknown("way of offloading", name, OFFLOADS))


def check_sides(settings: Settings, factor: int) -> None:
    """Raises UsageError where a given height or width is no multiple of the codec's factor."""
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and value % factor:
            near = max(factor, round(value / factor) * factor)
            raise UsageError(f"{name} is {value}; it takes a multiple of {factor}, such as {near}")


def borders(text: str) -> dict[str, int]:
    """Pixels by side, of "16" (all four) or "left=16, top=8". Raises UsageError on anything else."""
    allowed, wrong = ("left", "right", "top", "bottom"), f"--outpaint {text[:60]!r} is not of the form 16 or left=16,top=8"
    parts = [part.strip().partition("=") for part in text.split(",")]
    if len(parts) == 1 and not parts[0][1]:
        parts = [(side, "=", parts[0][0]) for side in allowed]
    found: dict[str, int] = {}
    for side, equals, value in ((a.strip(), b, c.strip()) for a, b, c in parts):
        if equals and side not in allowed:
            raise UsageError("--outpaint: " + unknown("side", side, allowed))
        if not equals or side in found or not re.fullmatch(r"[0-9]{1,5}", value):
            raise UsageError(wrong)
        found[side] = int(value)
    if not any(found.values()):
        raise UsageError(f"--outpaint {text[:60]!r} adds nothing; it takes 1 pixel or more on a side")
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it takes a whole number from {low} to {high}")
