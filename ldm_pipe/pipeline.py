"""Prompt to image: `Pipeline.from_pretrained("builtin")("a fox on a blue background").images[0]`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe import backends, image, memory, weights
from ldm_pipe.cond import Cond
from ldm_pipe.device import pick_device, pick_dtype
from ldm_pipe.editing.keep import Keep
from ldm_pipe.editing.source import Source
from ldm_pipe.errors import EnvironmentFault, UsageError, finite
from ldm_pipe.level import Level
from ldm_pipe.loading import Bundle, load
from ldm_pipe.model import CondAt, Denoiser, Rule, guided
from ldm_pipe.noise import Noise
from ldm_pipe.offload import Offload
from ldm_pipe.plan import Plan, conditions, plan, resolve, ruled, together, told
from ldm_pipe.result import Output as Output  # part of what this module offers
from ldm_pipe.settings import Settings, check_offload
from ldm_pipe.walk import Step, trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

PROBE = 16  # latent pixels of the small run from which a large one's memory is forecast


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A bundle on a device, in a dtype. Calls share nothing but the weights, so threads may call at once."""

    bundle: Bundle
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    offload: Offload | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str = "builtin",
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        offload: str = "none",
        **loading: Any,
    ) -> Pipeline:
        """Load whatever `loading.load` takes; its `allow_partial`, `tokenizer` and `text_encoder` may be given too. Weights are
        converted as they are read. Raises ModelError, UsageError or EnvironmentFault, one sentence each."""
        check_offload(offload)
        where = pick_device(device)
        bundle = load(source, kind=lambda wide: pick_dtype(dtype, where, wide)[0], **loading)
        found = cls(bundle).to(device, dtype, attention, offload)
        return replace(found, bundle=found.bundle.told())

    def to(self, device: str = "auto", dtype: str = "auto", attention: str = "auto", offload: str = "none") -> Pipeline:
        """The pipeline on a device ("auto", "cpu", "cuda", "cuda:1") in a dtype ("auto", "fp32", "fp16", "bf16"), with one of
        `backends.BACKENDS` or "auto". offload: "none", or the weights stay on the CPU and visit the device by part ("model")
        or by block ("sequential"). The weights move; use the pipeline that is returned."""
        check_offload(offload)
        where = pick_device(device)
        kind, _ = pick_dtype(dtype, where, self.wide)
        if self.offload is not None:
            self.offload.remove()
        bundle = self.bundle.to(where if offload == "none" else torch.device("cpu"), kind)
        found = Pipeline(bundle, where, kind, backends.choose(bundle.model, attention, where, kind))
        return found if offload == "none" else found.visiting(offload)

    def visiting(self, how: str) -> Pipeline:
        """The pipeline, whose weights lie on the CPU, with hooks that take them to its device."""
        bundle = replace(self.bundle, place=self.device)
        return replace(self, bundle=bundle, offload=Offload.of(bundle.modules(), how, self.device))

    @property
    def name(self) -> str:
        """ "builtin", or the last part of the model's folder: never a path of this machine."""
        return self.bundle.name if self.bundle.name == "builtin" else self.bundle.name.rstrip("/").rpartition("/")[2]

    @property
    def wide(self) -> bool:
        """Is the network wide enough to gain from bf16 on a CPU?"""
        return max((p.shape[0] for p in self.bundle.model.parameters() if p.ndim == 4), default=0) >= weights.WIDE

    def __call__(
        self,
        prompt: str | Sequence[str],
        rule: Rule | None = None,
        on_step: Callable[[Step], None] | None = None,
        init_image: Image | None = None,
        mask: Image | None = None,
        conds: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Output:
        """Make images. prompt: one or several; settings: the fields of `Settings` (seed=7, steps=25, num_images=4, ...).

        rule: guidance other than CFG(guidance_scale). on_step: called after every step of every batch. init_image: start from
        this picture, noised by `strength` (0.6 where it is not given); mask: greys of its size, white = drawn anew, black =
        kept to the bit. conds: prompts for branches that the rule names, {"negative": "a cat"}. Raises UsageError on wrong
        settings, NumericalError where a result is not finite.
        """
        return Output.joined(list(self.run(self.plan(prompt, rule, init_image, mask, conds, **settings), on_step)))

    def plan(
        self,
        prompt: str | Sequence[str],
        rule: Rule | None = None,
        init_image: Image | None = None,
        mask: Image | None = None,
        conds: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Plan:
        """What a call with these arguments would do, to be looked at or changed (`dataclasses.replace(plan, guides=...)`)."""
        if mask is not None and init_image is None:
            raise UsageError("a mask goes with an init image")
        source = Source(init_image, mask) if init_image is not None else None
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        return plan(self.bundle, prompts, resolve(self.bundle, Settings(**settings), source), rule, source, conds)

    def run(self, whole: Plan, on_step: Callable[[Step], None] | None = None) -> Iterator[Output]:
        """Run a plan, batch by batch as they are finished; each Output holds the images of one batch.

        Where memory runs out, batches become smaller (the images stay the same), then EnvironmentFault says which size fits.
        """
        size, notes = self._room(whole, whole.given.batch_size), list[str]()
        first = 0
        while first < len(whole.rows):
            out, part = None, whole.batch(first, together(self.bundle, whole, first, size))
            with memory.forgiven(), self.offload.turn() if self.offload else nullcontext():
                out = self._finish(part, on_step, notes)
            if out is None and len(part.rows) == 1:
                factor, (height, width) = self.bundle.codec.factor, part.shape[1:]
                near = memory.side_that_fits(2.0, height * width * factor**2, factor)
                raise EnvironmentFault(f"{width * factor}x{height * factor} pixels do not fit into memory; try {near}x{near}")
            if out is None:
                size = -(-len(part.rows) // 2)
                notes.append(f"memory ran out; {size} image(s) are computed at a time")
                continue
            first += len(part.rows)
            yield out

    def steps(self, prompt: str, rule: Rule | None = None, **settings: Any) -> Iterator[Step]:
        """The trajectory of one prompt's first batch, step by step (previews: `pipe.decode(step.estimate.x0)`)."""
        whole = self.plan(prompt, rule, **settings)
        try:
            yield from self._walk(whole.batch(0, whole.given.batch_size), Counter())
        finally:
            if self.offload:
                self.offload.home()

    def resolve(self, settings: Settings, source: Source | None = None) -> Settings:
        """The settings with every None decided: the model's defaults, a drawn seed. source: what an edit starts from."""
        return resolve(self.bundle, settings, source)

    def forecast(self, height: int, width: int, images: int = 1) -> int:
        """About how many bytes a step needs for images of this size in pixels under guidance (measured on a small one)."""
        model, codec = self.bundle.model, self.bundle.codec
        x = torch.zeros(1, codec.channels, PROBE, PROBE, device=self.device)
        peak = memory.peak(model, lambda: model(x, Level(0.5, 0.5), self.bundle.empty(PROBE)))
        return int(2 * images * peak * (height * width) / (PROBE * codec.factor) ** 2)

    def forecast_decoding(self, height: int, width: int) -> dict[str, Any]:
        """About how many bytes the decoder needs for one image of this size in pixels, and how it will be decoded with what is
        free now: "at once" or "in tiles of ... pixels"."""
        factor = self.bundle.codec.factor
        latents = torch.zeros(1, self.bundle.codec.channels, height // factor, width // factor, device=self.device)
        return memory.forecast_decoding(self.bundle.codec, latents)

    def _room(self, whole: Plan, size: int) -> int:
        """How many images at a time fit by the forecast, `size` at most. A run no larger than usual is not asked."""
        factor, (height, width) = self.bundle.codec.factor, whole.shape[1:]
        usual = 16 * self.bundle.defaults.size[0] * self.bundle.defaults.size[1]
        size = min(size, len(whole.rows))
        if size * height * width * factor**2 <= usual:
            return size
        room = memory.free(self.device)
        one = self.forecast(height * factor, width * factor)
        if one > room:
            near = memory.side_that_fits(one / (height * width * factor**2), room, factor)
            needed = f"{width * factor}x{height * factor} pixels need about {one / 2**30:.1f} GiB of memory"
            raise EnvironmentFault(f"{needed} and {room / 2**30:.1f} are free; --width {near} --height {near} fits")
        return min(size, room // max(1, one))

    def _finish(self, part: Plan, on_step: Callable[[Step], None] | None, notes: list[str]) -> Output:
        """One batch from noise to pictures. `notes` collects what the user should know of the whole run."""
        evaluations, x, walked = Counter[str](), torch.empty(0), 0
        for step in self._walk(part, evaluations):
            x, walked = step.x, walked + 1
            if on_step:
                on_step(step)
        decoded, tile = self._decoded(x, part.tile, notes)
        images = image.to_pil(decoded)
        if part.source is not None:
            images = part.source.paste(images)
        said = [*told(self.bundle, part), *notes, *([part.report(decoded)] if part.report is not None else [])]
        places = tuple((len(images), row) for row in range(len(images)))
        said = list(dict.fromkeys(said))
        found = Output(images, x, part.seeds, part.prompts, part.given, evaluations, tuple(said), places, part.recorded, walked)
        return replace(found, tiles=(tile,) * len(images))

    def _decoded(self, latents: Tensor, tile: int, notes: list[str]) -> tuple[Tensor, int]:
        """Finite images of latents, and the side of their tiles; a decoder that overflows in fp16 is asked again in fp32."""
        images, used = memory.decode(self.bundle.codec, latents, notes.append, tile)
        if self.dtype == torch.float16 and not bool(torch.isfinite(images).all()):
            notes.append("the decoder overflowed in fp16 and was run again in fp32")
            images, used = memory.decode(self.bundle.codec.to(latents.device, torch.float32), latents, notes.append, tile)
        return finite(images, "the decoder's image holds"), used

    def _walk(self, part: Plan, evaluations: Counter[str]) -> Iterator[Step]:
        noise = Noise(part.seeds, part.shape, self.device)
        branches = self.bundle.model.branches(**{**self.conds(part), **part.conds})
        denoise, x = self._started(part, guided(branches, ruled(self.bundle, part)), noise.start())
        for step in trajectory(denoise, x, part.levels, part.sampler, part.noise or noise):
            where = f"at step {step.number + 1} of {len(part.levels) - 1}"
            finite(step.estimate.x0, f"the network's estimate {where} holds")
            finite(step.x, f"the latents {where} hold")
            yield step
        evaluations.update(branches.evaluations)

    def _started(self, part: Plan, denoise: Denoiser, noise: Tensor) -> tuple[Denoiser, Tensor]:
        """The denoiser of a run and its first x: noise, or the noised or inverted picture of an edit, its known part held."""
        denoise = part.corrected(denoise, self.bundle.codec)
        if part.source is None or (self.bundle.inserts and part.given.strength == 1):
            return denoise, part.sampler.start(noise, part.levels[0]) if part.start is None else part.start
        with torch.no_grad():
            x0 = part.source.latents(self.bundle.codec, self.device)
        mask = part.source.latent_mask(self.bundle.codec.factor, self.device)
        if mask is not None and part.source.held:
            denoise = Keep(x0, mask, float(part.levels[0].u))(denoise)
        return denoise, part.levels[0].mix(x0, noise) if part.start is None else part.start

    def conds(self, part: Plan) -> dict[str, Cond | CondAt]:
        """The usual branches and those that the rule names."""
        return conditions(self.bundle, part)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B,3,H,W] in about -1..1 of latents [B,C,h,w]."""
        return self.bundle.codec.decode(latents)
