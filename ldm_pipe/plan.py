"""What a run is about to do: settings with every question decided, and the batches that follow from them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ldm_pipe import registry
from ldm_pipe.editing.source import Source
from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.guide import parse
from ldm_pipe.level import Level
from ldm_pipe.levels import tail
from ldm_pipe.loading import Bundle
from ldm_pipe.model import Denoiser, Rule
from ldm_pipe.noise import seeds_of
from ldm_pipe.settings import Settings, check_sides
from ldm_pipe.walk import Sampler

Row = tuple[str, int]
Guide = Callable[[Denoiser], Denoiser]


@dataclass(frozen=True)
class Plan:
    """A run, all decisions taken: every image's (prompt, seed), along which levels, by which sampler and rule.

    shape: (C, h, w) of one latent. given: the resolved settings it follows from. source: the picture that an edit starts from.
    guides: what corrects the guided estimate, the first one innermost. recorded: what else the recipe is to say (fields of
    `Recipe`). report: makes a sentence for the user of the finished images [B,3,H,W]. Methods change a plan with
    `dataclasses.replace`; `Pipeline.run` runs it.
    """

    rows: tuple[Row, ...]
    negative: str
    levels: tuple[Level, ...]
    sampler: Sampler
    rule: Rule
    shape: tuple[int, int, int]
    given: Settings
    source: Source | None = None
    guides: tuple[Guide, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Tensor], str] | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of every image."""
        return tuple(prompt for prompt, _ in self.rows)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every image."""
        return tuple(seed for _, seed in self.rows)

    def batch(self, first: int, size: int) -> Plan:
        """The same for `size` images from number `first` on."""
        return replace(self, rows=self.rows[first : first + size])


def resolve(bundle: Bundle, settings: Settings, source: Source | None = None) -> Settings:
    """The settings with every None decided: the model's defaults, a drawn seed. source: what an edit starts from."""
    if settings.strength is not None and source is None:
        raise UsageError("strength goes with an init image")
    if source is not None and settings.strength is None:
        settings = replace(settings, strength=1.0 if source.mask is not None else 0.6)
    d, codec = bundle.defaults, bundle.codec
    settings = replace(settings, height=settings.height or d.size[1], width=settings.width or d.size[0])
    check_sides(settings, codec.factor)
    seed = settings.seed if settings.seed is not None else secrets.randbelow(2**32)
    for first in settings.seeds or (seed,):
        seeds_of(first, settings.num_images)
    return replace(
        settings,
        seed=seed,
        steps=settings.steps or d.steps,
        guidance_scale=None if settings.guide else float(_or(settings.guidance_scale, d.guidance_scale)),
        sampler=settings.sampler or d.sampler,
        spacing=settings.spacing or d.spacing,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def plan(
    bundle: Bundle, prompts: Sequence[str], given: Settings, rule: Rule | None = None, source: Source | None = None
) -> Plan:
    """The plan of a run with resolved settings. rule: instead of the settings' guidance. source: where an edit starts."""
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise UsageError(f"prompt takes one text or several, got {prompts!r:.60}")
    codec = bundle.codec
    sampler = registry.build("sampler", str(given.sampler), **given.sampler_set)
    levels = registry.build("spacing", str(given.spacing), **given.spacing_set)(bundle.model.path, given.steps)
    shape = (codec.channels, int(given.height or 0) // codec.factor, int(given.width or 0) // codec.factor)
    if rule is None:
        rule = parse(given.guide) if given.guide else CFG(float(given.guidance_scale or 0.0))
    walk = tail(levels, given.strength) if given.strength else levels
    if source is not None:
        source = source.fitted(int(given.width or 0), int(given.height or 0))
    recorded = {"sources": source.digests} if source is not None else {}
    return Plan(_rows(prompts, given), given.negative_prompt, tuple(walk), sampler, rule, shape, given, source, (), recorded)


def _rows(prompts: Sequence[str], given: Settings) -> tuple[Row, ...]:
    first = given.seeds or (given.seed or 0,) * len(prompts)
    if len(first) != len(prompts):
        raise UsageError(f"seeds holds {len(first)} for {len(prompts)} prompt(s); it takes one for each")
    return tuple((p, s) for p, f in zip(prompts, first, strict=True) for s in seeds_of(f, given.num_images))
