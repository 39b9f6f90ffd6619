"""`--restore "pool(4)" --input small.png`: a picture from a degraded one, by any registered method, on pixels or on latents.

And `--init-image in.png --mask hole.png --method repaint`, `--outpaint 16`: the same methods for the white part of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ldm_pipe import calls, registry
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.restore.text import parse
from ldm_pipe.settings import borders

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.codec import Codec
    from ldm_pipe.model import Rule
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

MADE_HERE = ("measurement", "sampler", "codec", "background", "keep", "estimate")  # come from the run, not from the user
PLAIN = "keep"  # the method of a mask that is no registered one: x0 is held where the picture is known


@dataclass(frozen=True)
class Restoration:
    """operator: what degraded the picture, such as "pool(4)". method: a registered restoration, with its fields. deviation:
    of the noise in the picture, whose values are -1..1. Raises UsageError on unknown names and fields."""

    operator: str
    method: str = "dps"
    fields: dict[str, Any] = field(default_factory=dict)
    deviation: float = 0.0

    def __post_init__(self) -> None:
        calls.fields(self.operator, "operator")
        _check(self.method, self.fields, self.deviation)
        needs = [n for n, d in registry.entry("restoration", self.method).fields if d == "required" and n not in MADE_HERE[:3]]
        if needs:
            raise UsageError(f"--method {self.method} needs {needs[0]}, which is no text; use it from Python, or with --mask")

    def plan(self, pipe: Pipeline, prompts: Sequence[str], degraded: Image, rule: Rule | None = None, **settings: Any) -> Plan:
        """What a restoration would do. settings: the fields of `Settings`; the sampler and the steps are those of the method
        (`restore.defaults`) where they are not given."""
        return self.applied(pipe, pipe.plan(prompts, rule, **_filled(self.method, prompts, settings)), degraded)

    def applied(self, pipe: Pipeline, whole: Plan, degraded: Image) -> Plan:
        """The plan that restores: the method around its denoiser or its sampler, and a report of what it leaves unmet."""
        from ldm_pipe.image import digest
        from ldm_pipe.restore.defaults import ROUNDS
        from ldm_pipe.restore.latent import Latent
        from ldm_pipe.restore.operator import Measurement

        operator, codec = parse(self.operator), pipe.bundle.codec
        factor, (height, width) = codec.factor, whole.shape[1:]
        y = _measured(degraded, operator, (3, height * factor, width * factor)).to(pipe.device)
        pixels = Measurement(operator, y, self.deviation)
        fields = _fields(self.method, self.fields, pipe)
        seen = pixels if _space(pipe) == "pixels" else replace(pixels, operator=Latent(operator, codec, ROUNDS))
        method = _build(self.method, fields, {"measurement": seen, "images": pixels, "sampler": whole.sampler, "codec": codec})
        sources = {**whole.recorded.get("sources", {}), "input": digest(degraded)}
        recorded = {**whole.recorded, "sources": sources, "restoration": asdict(replace(self, fields=fields))}
        return replace(_within(whole, method), recorded=recorded, report=lambda images: _report(images, pixels, codec))


@dataclass(frozen=True)
class Inpainting:
    """What becomes of the white part of a mask. method: "keep", or a registered restoration in latents under their mask, with
    its fields and its deviation. outpaint: instead of a mask the border that the picture gets, such as "16" or "left=16, top=8"
    in pixels. Raises UsageError on unknown names and fields.
    """

    method: str = PLAIN
    fields: dict[str, Any] = field(default_factory=dict)
    deviation: float = 0.0
    outpaint: str = ""

    def __post_init__(self) -> None:
        if self.method != PLAIN:
            _check(self.method, self.fields, self.deviation, (PLAIN,))
        elif self.fields:
            raise UsageError(f"--set restore.{next(iter(self.fields))}: {PLAIN} has no fields; choose a --method")
        if self.outpaint:
            borders(self.outpaint)

    def plan(
        self, pipe: Pipeline, prompts: Sequence[str], picture: Image, mask: Image | None, rule: Rule | None = None,
        **settings: Any,
    ) -> Plan:  # fmt: skip
        """What an edit of this picture would do. mask: white is drawn anew, None with `outpaint`. settings: the fields of
        `Settings`; the sampler and the steps are those of the method where they are not given."""
        from ldm_pipe.editing.source import Source
        from ldm_pipe.image import digest

        own = {"init_image": digest(picture.convert("RGB"))}
        if self.outpaint:
            framed = Source.framed(picture, **borders(self.outpaint))
            picture, mask = framed.picture, framed.mask
            settings = _sized(settings, picture.size, pipe.bundle.multiple)
        if self.method != PLAIN:
            settings = _filled(self.method, prompts, settings)
        whole = pipe.plan(prompts, rule, picture, mask, **settings)
        recorded = {**whole.recorded, "restoration": asdict(self)} | ({"sources": own} if self.outpaint else {})
        return self._applied(pipe, replace(whole, recorded=recorded))

    def _applied(self, pipe: Pipeline, whole: Plan) -> Plan:
        """The plan with the method in the place of holding x0."""
        import torch

        from ldm_pipe.restore.mask import Mask
        from ldm_pipe.restore.operator import Measurement

        if self.method == PLAIN:
            return whole
        codec, source = pipe.bundle.codec, whole.source
        assert source is not None
        if source.mask is None:
            raise UsageError(f"--method {self.method} goes with --mask FILE, --outpaint or --restore")
        known: dict[str, tuple[Measurement, Any, Any]] = {}
        with torch.no_grad():
            for name, factor, clean in (
                ("images", 1, source.pixels(pipe.device)), ("measurement", codec.factor, source.latents(codec, pipe.device))
            ):  # fmt: skip
                white = source.latent_mask(factor, pipe.device)
                assert white is not None
                known[name] = Measurement(Mask(white == 0), clean * (white == 0), self.deviation), clean, white == 0
        made: dict[str, Any] = {name: measurement for name, (measurement, _, _) in known.items()}
        _, background, keep = known["measurement"]
        fields = _fields(self.method, self.fields, pipe, in_latents=False)
        made |= {"sampler": whole.sampler, "codec": codec, "background": background, "keep": keep}
        recorded = {**whole.recorded, "restoration": asdict(replace(self, fields=fields))}
        whole = replace(whole, source=replace(source, held=False), recorded=recorded)
        return _within(whole, _build(self.method, fields, made))


def _sized(settings: dict[str, Any], size: tuple[int, int], multiple: int) -> dict[str, Any]:
    """The settings with the size of the framed picture. Raises UsageError where they ask for another one, or the model does."""
    if size[0] % multiple or size[1] % multiple:
        raise UsageError(f"the picture with its border is {size[0]}x{size[1]} pixels; this model takes multiples of {multiple}")
    for name, side in zip(("width", "height"), size, strict=True):
        if settings.get(name) not in (None, side):
            raise UsageError(f"--{name} is {settings[name]}, but the picture with its border is {side}; leave it out")
    return {**settings, "width": size[0], "height": size[1]}


def _check(method: str, given: Mapping[str, Any], deviation: float, more: tuple[str, ...] = ()) -> None:
    """Raise UsageError on a method, a field or a deviation that there is not."""
    if method not in registry.KINDS["restoration"]:
        raise UsageError("--method " + unknown("restoration", method, (*registry.KINDS["restoration"], *more)))
    known = [n for n, _ in registry.entry("restoration", method).fields if n not in MADE_HERE]
    for name in given:
        if name not in known:
            raise UsageError("--set restore: " + unknown(f"field of {method}", name, (*known, "deviation")))
    if not 0 <= deviation <= 2:
        raise UsageError(f"the deviation of the noise is {deviation}; it takes 0 to 2")


def _filled(method: str, prompts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the method's own sampler and steps where none are given; nothing is asked twice without a prompt."""
    from ldm_pipe.restore import defaults

    found = dict(settings)
    if found.get("sampler") is None and method in defaults.KERNELS:
        name, fields = defaults.KERNELS[method]
        found |= {"sampler": name, "sampler_set": {**fields, **found.get("sampler_set", {})}}
    if found.get("spacing") is None and method in defaults.SPACINGS:
        found["spacing"] = defaults.SPACINGS[method]
    if found.get("steps") is None:
        found["steps"] = defaults.STEPS.get(method, defaults.USUAL)
    unguided = found.get("guidance_scale") is None and found.get("guide") is None and not found.get("negative_prompt")
    return found | ({"guidance_scale": 1.0} if unguided and not any(prompts) else {})


def _space(pipe: Pipeline) -> str:
    """Where the network lives: "latents" or "pixels"."""
    from ldm_pipe.codec import Identity

    return "pixels" if pipe.bundle.codec == Identity() else "latents"


def _fields(method: str, given: Mapping[str, Any], pipe: Pipeline, in_latents: bool = True) -> dict[str, Any]:
    """The fields of a method, with those for operators behind a decoder where the user gives none."""
    from ldm_pipe.restore import defaults

    usual = defaults.LATENT if in_latents else defaults.UNDER_MASK
    return {**(usual.get(method, {}) if _space(pipe) == "latents" else {}), **given}


def _build(method: str, fields: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """The method. One that takes a codec decodes by itself: its measurement is that of the images."""
    wanted = {n for n, _ in registry.entry("restoration", method).fields}
    if "codec" in wanted:
        made = {**made, "measurement": made["images"]}
    return registry.build("restoration", method, **fields, **{n: v for n, v in made.items() if n in wanted})


def _within(whole: Plan, method: Any) -> Plan:
    """The plan with a method as its sampler, over the levels that it walks, or as its outermost guide."""
    if not hasattr(method, "step"):
        return replace(whole, guides=(*whole.guides, method))
    # What the model's own sampler added to the levels is there already.
    levels = whole.levels if whole.sampler.travels else tuple(method.walk(whole.levels))
    return replace(whole, sampler=method, levels=levels)


def _measured(picture: Image, operator: Any, shape: tuple[int, int, int]) -> Tensor:
    """The degraded picture as data of the operator on images of this shape, [1,...]."""
    import torch

    from ldm_pipe.image import to_tensor

    wanted = tuple(operator(torch.zeros(1, *shape)).shape[1:])
    y = to_tensor([picture])
    if len(wanted) == 3 and wanted[0] == 1:
        y = y.mean(1, keepdim=True)
    if tuple(y.shape[1:]) != wanted:
        flat = len(wanted) == 3 and wanted[0] in (1, 3)
        size = f"{wanted[2]}x{wanted[1]} pixels" if flat else "no picture (use it from Python)"
        own = f"{picture.width}x{picture.height}"
        raise UsageError(f"--input is {own} pixels; this operator makes {size} of {shape[2]}x{shape[1]}")
    return y


def _report(images: Tensor, measurement: Any, codec: Codec) -> str:
    """How far the results are from the data, and how far the codec alone takes them."""
    import torch

    with torch.no_grad():
        missed = measurement.misfit(images).square().mean().sqrt()
        own = (codec.decode(codec.encode(images)) - images).square().mean().sqrt()
    ceiling = f"the codec's own round trip misses by {float(own):.4f}"
    return f"the data are missed by {float(missed):.4f} rms, where values span 2; {ceiling}"
