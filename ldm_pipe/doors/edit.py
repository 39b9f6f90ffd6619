"""`--edit "a fox on blue -> a cat on blue"`: a picture and its edit, drawn side by side, from a seed or from a given picture.

Edit("a fox on a blue background", "a cat on a blue background")(pipe, picture).images[1]
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ldm_pipe import registry
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.grammar import parse, spoken

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.editing.invert import Inverse
    from ldm_pipe.model import Rule
    from ldm_pipe.pipeline import Output, Pipeline
    from ldm_pipe.plan import Plan

# On the built-in model, whose guidance is mild, right more often than null-text (docs/results/editing.md) and far cheaper.
INVERSION = "plain"


@dataclass(frozen=True)
class Edit:
    """source, target: prompts. method: a registered editing, with its fields. inversion: of a given picture, a registered one,
    with its inversion_fields. Raises UsageError on unknown names and fields."""

    source: str
    target: str
    method: str = "prompt_to_prompt"
    fields: dict[str, Any] = field(default_factory=dict)
    inversion: str = INVERSION
    inversion_fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        inversion = ("inversion", "inversion", self.inversion, self.inversion_fields)
        for word, kind, name, given in (("edit", "editing", self.method, self.fields), inversion):
            known = [n for n, _ in registry.entry(kind, name).fields]
            for one in given:
                if one not in known:
                    raise UsageError(f"--set {word}: " + unknown(f"field of {name}", one, known))

    def check(self) -> None:
        """Raise UsageError on values that the method or the inversion refuses. Imports them, and torch with them."""
        registry.build("editing", self.method, **self.fields)
        registry.build("inversion", self.inversion, **self.inversion_fields)

    @classmethod
    def of(
        cls, text: str, fields: dict[str, Any], method: str = "prompt_to_prompt", inversion_fields: dict[str, Any] | None = None
    ) -> Edit:
        """From "SOURCE -> TARGET" and the fields that --set gives; the field `inversion` is the name of one."""
        source, arrow, target = (part.strip() for part in text.partition("->"))
        if not (arrow and source and target):
            raise UsageError(f'--edit {text[:80]!r} is not of the form "a fox on blue -> a cat on blue"')
        for name in ("source", "target"):
            if name in fields:
                raise UsageError(f"--set edit.{name}: the prompts stand in --edit")
        fields = dict(fields)
        inversion = str(fields.pop("inversion", INVERSION))
        return cls(source, target, method, fields, inversion, inversion_fields or {})

    def __call__(
        self, pipe: Pipeline, picture: Image | None = None, mask: Image | None = None, rule: Rule | None = None, **settings: Any
    ) -> Output:
        """Make the sources and then, in their order, the edits. picture: what is edited; without it, sources are drawn from
        their seeds. mask: white may change, black is kept to the bit. settings: the fields of `Settings`."""
        from ldm_pipe.pipeline import Output

        return Output.joined(list(pipe.run(self.plan(pipe, picture, mask, rule, **settings))))

    def plan(
        self, pipe: Pipeline, picture: Image | None = None, mask: Image | None = None, rule: Rule | None = None, **settings: Any
    ) -> Plan:
        """What a call with these arguments would do; a picture is inverted here already."""
        from ldm_pipe.settings import Settings

        settings = self._worded(pipe, settings)
        if picture is not None:
            settings = self._for_picture(settings)
        given = pipe.resolve(Settings(**{**settings, "strength": None}))
        seeds = given.seeds or (given.seed,) * 2  # of a replay, or one for both prompts
        prompts = [prompt for prompt in (self.source, self.target) for _ in range(len(seeds) // 2)]
        return self.applied(pipe, pipe.plan(prompts, rule, picture, mask, **{**settings, "seed": given.seed, "seeds": seeds}))

    def applied(self, pipe: Pipeline, whole: Plan) -> Plan:
        """The plan of n sources followed by their n targets, with the method in it and in one batch."""
        from ldm_pipe.editing.pairs import Pairs
        from ldm_pipe.plan import taken

        count = len(whole.rows) // 2
        both, recorded = [*range(count)] * 2, {**whole.recorded, "edit": asdict(self)}
        if whole.source is not None:
            digests = whole.source.digests
            found, report = self._inverted(pipe, whole)
            whole = replace(
                whole,
                levels=found.levels,
                start=found.x[both],
                noise=found.noise and found.noise.take(both),
                conds={**whole.conds, **{name: taken(cond, both) for name, cond in found.conds.items()}},
                report=lambda images: report,
            )
            recorded["sources"] = {"input" if n == "init_image" else n: d for n, d in digests.items()}
        pairs = Pairs(
            spoken(self.source, whole.given.plain_prompt),
            spoken(self.target, whole.given.plain_prompt),
            tuple((k, count + k) for k in range(count)),
            pipe.bundle.model,
            pipe.bundle.text,
            whole.levels,
            whole.sampler,
            whole.guides,
            whole.conds,
            None if whole.source is None else whole.source.latent_mask(1, pipe.device),
            whole.negative,
        )
        done = registry.build("editing", self.method, **self.fields)(pairs)
        given = replace(whole.given, batch_size=2 * count)
        return replace(whole, given=given, guides=done.guides, sampler=done.sampler, conds=done.conds, recorded=recorded)

    def _worded(self, pipe: Pipeline, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with the prompts as they are where their grammar changes nothing. Weights change no token, so that words
        keep their places; raises UsageError on what would move them."""
        negative = str(settings.get("negative_prompt", ""))
        read = [*((p, parse(p)) for p in (self.source, self.target)), (negative, parse(negative, joins=False))]
        if settings.get("plain_prompt") or all(p.plain and p.at(0, 1)[0].text == text for text, p in read):
            return {**settings, "plain_prompt": True}
        if any(len(p.branches) > 1 or p.scheduled or pipe.bundle.text.chunks(p.at(0, 1)[0]) > 1 for _, p in read):
            raise UsageError("--edit takes weights in its prompts, but no AND, BREAK, [a:b:0.5] or a second window")
        if self.method in ("structured", "shape_guided"):  # which encode prompts by themselves
            raise UsageError(f"--method {self.method} takes no weights in its prompts; --plain-prompt reads brackets as text")
        return settings

    def _for_picture(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with what the inversion asks for where the user does not: a sampler that it can invert, a whole walk."""
        sampler, fields = registry.build("inversion", self.inversion, **self.inversion_fields).sampler
        if settings.get("sampler") is None:
            settings = {**settings, "sampler": sampler, "sampler_set": {**fields, **settings.get("sampler_set", {})}}
        return {**settings, "strength": settings.get("strength") or 1.0}

    def _inverted(self, pipe: Pipeline, whole: Plan) -> tuple[Inverse, str]:
        """The inverse of the picture, a row for every source, and what the user is to know of it."""
        import torch

        from ldm_pipe.editing.invert import Remake
        from ldm_pipe.noise import Noise

        assert whole.source is not None
        sources = whole.batch(0, len(whole.rows) // 2)
        method = registry.build("inversion", self.inversion, **self.inversion_fields)
        if self.inversion == "negative_prompt" and whole.negative:
            raise UsageError("inversion negative_prompt takes the source's prompt as the negative; leave --negative-prompt out")
        branches = pipe.bundle.model.branches(**{**pipe.conds(sources), **sources.conds})
        noise = Noise(sources.seeds, whole.shape, pipe.device)
        with torch.no_grad():
            picture = whole.source.latents(pipe.bundle.codec, pipe.device)
            own = pipe.bundle.codec.decode(picture) - whole.source.pixels(pipe.device)
        run = Remake(branches, whole.rule, whole.levels, whole.sampler, noise)
        found = method(picture.expand(len(sources.rows), *whole.shape), run)
        return found, _report(self.inversion, found.error, own, branches.evaluations)


def _report(inversion: str, error: Tensor, own: Tensor, evaluations: Counter[str]) -> str:
    missed, codec = float(error.max()), float(own.square().mean().sqrt())
    cost = f"{sum(evaluations.values())} evaluations"
    latents = f"inversion {inversion} makes the picture's latents again to {missed:.4f} rms of their deviation 1, after {cost}"
    return f"{latents}; the codec's own round trip misses the picture by {codec:.4f} rms, where values span 2"
