"""Prompt to image: `Pipeline.from_pretrained("builtin")("a fox on a blue background").images[0]`."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe import image, registry
from ldm_pipe.cond import Cond
from ldm_pipe.device import pick_device, pick_dtype
from ldm_pipe.errors import NumericalError, UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.guide import parse
from ldm_pipe.level import Level
from ldm_pipe.loading import Bundle, load
from ldm_pipe.model import Rule, guided
from ldm_pipe.noise import Noise, seeds_of
from ldm_pipe.settings import Settings
from ldm_pipe.walk import Sampler, Step, trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = 256  # channels from which bf16 gains on a CPU (x1.3; x2.1 at 1280): scripts/bench/dtype.py


@dataclass(frozen=True)
class Output:
    """What a call returns: one entry per image, prompts in order, each prompt's images together.

    latents: [N,C,h,w]. evaluations: how many images the network saw, per branch. notices: sentences for the user.
    """

    images: list[Image]
    latents: Tensor
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    settings: Settings
    evaluations: Counter[str]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """One batch of a run, all decisions taken: who is drawn, along which levels, by which sampler and rule."""

    prompts: tuple[str, ...]
    negative: str
    seeds: tuple[int, ...]
    levels: tuple[Level, ...]
    sampler: Sampler
    rule: Rule
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A bundle on a device, in a dtype. Calls share nothing but the weights, so threads may call at once."""

    bundle: Bundle
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_pretrained(cls, source: str = "builtin", device: str = "auto", dtype: str = "auto") -> Pipeline:
        """Load "builtin" or a diffusers folder. Raises ModelError, UsageError or EnvironmentFault, one sentence each."""
        return cls(load(source)).to(device, dtype)

    def to(self, device: str = "auto", dtype: str = "auto") -> Pipeline:
        """The pipeline on a device ("auto", "cpu", "cuda", "cuda:1") in a dtype ("auto", "fp32", "fp16", "bf16"). The
        weights move; use the pipeline that is returned."""
        where = pick_device(device)
        kind, _ = pick_dtype(dtype, where, self.wide)
        return Pipeline(self.bundle.to(where, kind), where, kind)

    @property
    def name(self) -> str:
        """"builtin", or the last part of the model's folder: never a path of this machine."""
        return self.bundle.name if self.bundle.name == "builtin" else self.bundle.name.rstrip("/").rpartition("/")[2]

    @property
    def wide(self) -> bool:
        """Is the network wide enough to gain from bf16 on a CPU?"""
        return max((p.shape[0] for p in self.bundle.model.parameters() if p.ndim == 4), default=0) >= WIDE

    def __call__(
        self,
        prompt: str | Sequence[str],
        rule: Rule | None = None,
        on_step: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Output:
        """Make images. prompt: one or several; settings: the fields of `Settings` (seed=7, steps=25, num_images=4, ...).

        rule: guidance other than CFG(guidance_scale). on_step: called after every step of every batch.
        Raises UsageError on wrong settings, NumericalError where a result is not finite.
        """
        parts = list(self.batches(prompt, rule, on_step, **settings))
        return Output(
            [i for part in parts for i in part.images],
            torch.cat([part.latents for part in parts]),
            tuple(s for part in parts for s in part.seeds),
            tuple(p for part in parts for p in part.prompts),
            parts[0].settings,
            sum((part.evaluations for part in parts), Counter()),
            tuple(dict.fromkeys(n for part in parts for n in part.notices)),
        )

    def batches(
        self,
        prompt: str | Sequence[str],
        rule: Rule | None = None,
        on_step: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Iterator[Output]:
        """The same, batch by batch as they are finished; each Output holds the images of one batch."""
        given = self.resolve(Settings(**settings))
        for plan in self.plans((prompt,) if isinstance(prompt, str) else tuple(prompt), given, rule):
            evaluations, x = Counter[str](), None
            for step in self._walk(plan, evaluations):
                x = step.x
                if on_step:
                    on_step(step)
            assert x is not None
            images = image.to_pil(_finite(self.decode(x), "the decoder's image holds"))
            notices = tuple(n for p in dict.fromkeys(plan.prompts) for n in self.bundle.text.notices(p))
            yield Output(images, x, plan.seeds, plan.prompts, given, evaluations, notices)

    def steps(self, prompt: str, rule: Rule | None = None, **settings: Any) -> Iterator[Step]:
        """The trajectory of one prompt's first batch, step by step (previews: `pipe.decode(step.estimate.x0)`)."""
        given = self.resolve(Settings(**settings))
        yield from self._walk(next(self.plans((prompt,), given, rule)), Counter())

    def resolve(self, settings: Settings) -> Settings:
        """The settings with every None decided: the model's defaults, a drawn seed."""
        d, codec = self.bundle.defaults, self.bundle.codec
        height, width = settings.height or d.size[1], settings.width or d.size[0]
        for name, value in (("height", height), ("width", width)):
            if value % codec.factor:
                near = max(codec.factor, round(value / codec.factor) * codec.factor)
                raise UsageError(f"{name} is {value}; it takes a multiple of {codec.factor}, such as {near}")
        seed = settings.seed if settings.seed is not None else secrets.randbelow(2**32)
        seeds_of(seed, settings.num_images)
        return replace(
            settings,
            seed=seed,
            height=height,
            width=width,
            steps=settings.steps or d.steps,
            guidance_scale=float(d.guidance_scale if settings.guidance_scale is None else settings.guidance_scale),
            sampler=settings.sampler or d.sampler,
            spacing=settings.spacing or d.spacing,
        )

    def plans(self, prompts: Sequence[str], given: Settings, rule: Rule | None = None) -> Iterator[Plan]:
        """The batches of a run with resolved settings."""
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise UsageError(f"prompt takes one text or several, got {prompts!r:.60}")
        codec = self.bundle.codec
        assert given.sampler
        assert given.spacing
        assert given.height
        assert given.width
        sampler = registry.build("sampler", given.sampler, **given.sampler_set)
        levels = registry.build("spacing", given.spacing, **given.spacing_set)(self.bundle.model.path, given.steps)
        shape = (codec.channels, given.height // codec.factor, given.width // codec.factor)
        if rule is None:
            rule = parse(given.guide) if given.guide else CFG(float(given.guidance_scale or 0.0))
        rows = _rows(prompts, given)
        for first in range(0, len(rows), given.batch_size):
            texts, seeds = zip(*rows[first : first + given.batch_size], strict=True)
            yield Plan(texts, given.negative_prompt, seeds, tuple(levels), sampler, rule, shape)

    def _walk(self, plan: Plan, evaluations: Counter[str]) -> Iterator[Step]:
        noise = Noise(plan.seeds, plan.shape, self.device)
        x = plan.sampler.start(noise.start(), plan.levels[0])
        branches = self.bundle.model.branches(**self._conds(plan))
        for step in trajectory(guided(branches, plan.rule), x, plan.levels, plan.sampler, noise):
            where = f"at step {step.number + 1} of {len(plan.levels) - 1}"
            _finite(step.estimate.x0, f"the network's estimate {where} holds")
            _finite(step.x, f"the latents {where} hold")
            yield step
        evaluations.update(branches.evaluations)

    def _conds(self, plan: Plan) -> dict[str, Cond]:
        """The two usual branches, from one call of the text encoder."""
        both = self.bundle.text([*plan.prompts, *[plan.negative] * len(plan.prompts)])
        half = len(plan.prompts)
        return {"cond": both.take(slice(0, half)), "uncond": both.take(slice(half, None))}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] in about -1..1 of latents [B,C,h,w]."""
        return self.bundle.codec.decode(latents)


def _rows(prompts: Sequence[str], given: Settings) -> list[tuple[str, int]]:
    """(prompt, seed) of every image of a run with resolved settings."""
    first = given.seeds or (given.seed or 0,) * len(prompts)
    if len(first) != len(prompts):
        raise UsageError(f"seeds holds {len(first)} for {len(prompts)} prompt(s); it takes one for each")
    return [(p, s) for p, f in zip(prompts, first, strict=True) for s in seeds_of(f, given.num_images)]


def _finite(t: Tensor, stage: str) -> Tensor:
    if not bool(torch.isfinite(t).all()):
        raise NumericalError(f"{stage} NaN or Inf; try --dtype fp32 or a lower --guidance-scale")
    return t
