"""What a run is about to do: settings with every question decided, and the batches that follow from them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ldm_pipe import registry
from ldm_pipe.channels import rule_of, with_channels
from ldm_pipe.codec import Codec
from ldm_pipe.cond import Cond
from ldm_pipe.editing.source import Source
from ldm_pipe.errors import UsageError
from ldm_pipe.grammar import spoken
from ldm_pipe.guide import guides, parse
from ldm_pipe.level import Level
from ldm_pipe.levels import tail
from ldm_pipe.loading import Bundle, load
from ldm_pipe.model import CondAt, Denoiser, Model, Rule
from ldm_pipe.noise import Recorded, seeds_of
from ldm_pipe.patch import Patch, Patched, Run, root
from ldm_pipe.prepare import ready, texts
from ldm_pipe.settings import Settings, check_sides
from ldm_pipe.walk import Sampler
from ldm_pipe.wording import Script, State, joined, notices, reads

Row = tuple[str, int]
Guide = Callable[[Denoiser], Denoiser]


@dataclass(frozen=True)
class Plan:
    """A run, all decisions taken: every image's (prompt, seed), along which levels, by which sampler and rule.

    shape: (C, h, w) of one latent. given: the resolved settings it follows from. source: the picture that an edit starts from.
    start, noise: x at the first level [N,C,h,w] and what the sampler draws, where an inversion found them. conds: conditions of
    all images that take the place of the usual ones, by branch. texts: prompts of further branches, of all images. paced: the
    levels whose steps a prompt's schedule counts, where they are not those of the walk. tile: side of the decoder's tiles in
    latent pixels, 0 where memory decides.
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
    start: Tensor | None = None
    noise: Recorded | None = None
    conds: Mapping[str, Cond | CondAt] = field(default_factory=dict)
    guides: tuple[Guide, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Tensor], str] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    paced: tuple[Level, ...] = ()
    tile: int = 0

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt of every image."""
        return tuple(prompt for prompt, _ in self.rows)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every image."""
        return tuple(seed for _, seed in self.rows)

    def corrected(self, denoise: Denoiser, codec: Codec) -> Denoiser:
        """The denoiser under the guides. One that has `prepared(codec, prompts)` is made ready for these images first."""
        words = tuple(spoken(prompt, self.given.plain_prompt) for prompt in self.prompts)
        for guide in self.guides:
            made: Any = guide
            denoise = (made.prepared(codec, words) if hasattr(made, "prepared") else made)(denoise)
        return denoise

    def batch(self, first: int, size: int) -> Plan:
        """The same for `size` images from number `first` on."""
        rows = range(len(self.rows))[first : first + size]
        conds = {name: taken(cond, rows) for name, cond in self.conds.items()}
        start = None if self.start is None else self.start[list(rows)]
        noise = None if self.noise is None else self.noise.take(rows)
        return replace(self, rows=self.rows[first : first + size], start=start, noise=noise, conds=conds)


def taken(cond: Cond | CondAt, rows: Sequence[int]) -> Cond | CondAt:
    """Some rows of a condition, at every level where it is a function of it."""
    return cond.take(rows) if isinstance(cond, Cond) else lambda level: cond(level).take(rows)


def resolve(bundle: Bundle, settings: Settings, source: Source | None = None) -> Settings:
    """The settings with every None decided: the model's defaults, a drawn seed. source: what an edit starts from."""
    if settings.strength is not None and source is None:
        raise UsageError("strength goes with an init image")
    if source is not None and settings.strength is None:
        settings = replace(settings, strength=1.0 if source.mask is not None or bundle.inserts else 0.6)
    d = bundle.defaults
    settings = replace(settings, height=settings.height or d.size[1], width=settings.width or d.size[0])
    check_sides(settings, bundle.multiple)
    seed = settings.seed if settings.seed is not None else secrets.randbelow(2**32)
    for first in settings.seeds or (seed,):
        seeds_of(first, settings.num_images)
    spaced = {} if settings.spacing else bundle.spacing_set(int(settings.width or 0), int(settings.height or 0))
    return replace(
        settings,
        seed=seed,
        steps=settings.steps or d.steps,
        guidance_scale=None if settings.guide else float(_or(settings.guidance_scale, d.guidance_scale)),
        sampler=settings.sampler or d.sampler,
        spacing=settings.spacing or d.spacing,
        spacing_set={**spaced, **settings.spacing_set},
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def plan(
    bundle: Bundle,
    prompts: Sequence[str],
    given: Settings,
    rule: Rule | None = None,
    source: Source | None = None,
    conds: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a run with resolved settings. rule: instead of the settings' guidance. source: where an edit starts. conds:
    prompts of all images for branches that the rule names."""
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise UsageError(f"prompt takes one text or several, got {prompts!r:.60}")
    codec = bundle.codec
    sampler = registry.build("sampler", str(given.sampler), **given.sampler_set)
    if not sampler.calls:  # a tolerance decides the steps, and those of a batch would follow from its worst image
        given = replace(given, batch_size=1)
    shape = (codec.channels, int(given.height or 0) // codec.factor, int(given.width or 0) // codec.factor)
    levels = registry.build("spacing", str(given.spacing), **_spacing(given, shape))(bundle.model.path, given.steps)
    if rule is None:
        scale = 1.0 if bundle.embeds else float(given.guidance_scale or 0.0)
        rule = parse(given.guide) if given.guide else rule_of(bundle.inserts, scale)
    walk = sampler.walk(tail(levels, given.strength) if given.strength else levels)
    if source is not None:
        source = source.fitted(int(given.width or 0), int(given.height or 0))
        source = replace(source, held=source.held and bundle.inserts is None)
    recorded = {"sources": source.digests} if source is not None else {}
    rows = _rows(prompts, given)
    rule = ready(rule, given, _loader(bundle))
    named = {**texts(rule), **(conds or {})}
    correct = guides(given.guide) if given.guide else ()
    found = Plan(rows, given.negative_prompt, tuple(walk), sampler, rule, shape, given, source, recorded=recorded)
    found = replace(found, texts=named, guides=correct)
    for row in dict(rows).items():
        ruled(bundle, replace(found, rows=(row,)))  # said before the run
    return found


def _loader(bundle: Bundle) -> Callable[[str], Model]:
    """What loads another model to where this one is, in its dtype."""

    def other(folder: str) -> Model:
        weight = next(bundle.model.parameters())
        return load(folder).to(bundle.device, weight.dtype).model

    return other


def _spacing(given: Settings, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The spacing's fields; `tokens` are those of the latent, 2x2 of its pixels each, where nothing else is asked for."""
    asks = "tokens" in dict(registry.entry("spacing", str(given.spacing)).fields)
    return {**({"tokens": max(1, shape[1] * shape[2] // 4)} if asks else {}), **given.spacing_set}


def conditions(bundle: Bundle, part: Plan) -> dict[str, Cond | CondAt]:
    """The usual branches of a run and those that its rule names, with what of its source the network takes behind x; a function
    of the level where the prompts' words change over the walk."""
    size = (part.shape[1] * bundle.codec.factor, part.shape[2] * bundle.codec.factor)

    @torch.no_grad()
    def encode(words: State, chunks: int) -> dict[str, Cond]:
        row, negative, scale = dict(words), words["uncond"][0], part.given.guidance_scale
        found = bundle.conditions(row.pop("cond"), negative, scale, chunks)
        found = with_channels(found, bundle.inserts, bundle.codec, part.source, size)
        del row["uncond"]
        others = {name: bundle.conditions(w, negative, scale, chunks)["cond"] for name, w in row.items()}
        return found | {name: replace(cond, channels=found["cond"].channels) for name, cond in others.items()}

    if reads(bundle.text, part.given.plain_prompt):
        return _script(part).conds(bundle.text, encode)
    same = {name: (text,) * len(part.rows) for name, text in {"uncond": part.negative, **part.texts}.items()}
    return {**encode({"cond": part.prompts, **same}, 1)}


def _script(part: Plan) -> Script:
    return Script.of(part.prompts, part.negative, part.texts, part.paced or part.levels)


def ruled(bundle: Bundle, part: Plan) -> Rule:
    """The rule of a batch, made for the parts that AND joins in its prompts. Raises UsageError where that cannot be."""
    if not reads(bundle.text, part.given.plain_prompt):
        return part.rule
    return joined(part.rule, _script(part).weights, bundle.inserts)


def together(bundle: Bundle, whole: Plan, first: int, size: int) -> int:
    """How many images from number `first` on, `size` at most, are computed at once: prompts that take as many windows of the
    encoder and join parts of the same weights. So an image is the same whatever else is drawn."""
    rows = whole.prompts[first : first + size]
    if not reads(bundle.text, whole.given.plain_prompt):
        return len(rows)
    scripts = {p: Script.of((p,), whole.negative, whole.texts, whole.paced or whole.levels) for p in rows}
    kinds = {p: (script.chunks(bundle.text), script.weights) for p, script in scripts.items()}
    return next((k for k, p in enumerate(rows) if kinds[p] != kinds[rows[0]]), len(rows))


def told(bundle: Bundle, part: Plan) -> list[str]:
    """What a user should know of the prompts."""
    plain, distinct = part.given.plain_prompt, dict.fromkeys(part.prompts)
    said = [n for p in distinct for n in notices(bundle.text, p, plain)]
    return said + notices(bundle.text, part.negative, plain, joins=False)


def _rows(prompts: Sequence[str], given: Settings) -> tuple[Row, ...]:
    first = given.seeds or (given.seed or 0,) * len(prompts)
    if len(first) != len(prompts):
        raise UsageError(f"seeds holds {len(first)} for {len(prompts)} prompt(s); it takes one for each")
    return tuple((p, s) for p, f in zip(prompts, first, strict=True) for s in seeds_of(f, given.num_images))


def patched(whole: Plan, model: Model, patches: Sequence[Patch]) -> Plan:
    """The plan with patches in the model's network, the first one innermost, within every guide. Raises UsageError where the
    network does not suit one."""
    run, sampler = Run.of(model, whole.levels), whole.sampler
    for patch in patches:
        patch.changes(root(model), run)  # said before the run
        sampler = patch.sampler(sampler, run)
    return replace(whole, sampler=sampler, guides=(Patched(model, tuple(patches), run), *whole.guides))
