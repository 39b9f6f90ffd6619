"""What the command line asks for: flags over a TOML file, prompts from a file, every value checked before torch is imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from ldm_pipe import grammar, guide, inputs, level_file, registry, strict
from ldm_pipe.doors.adapters import Adapters
from ldm_pipe.doors.controls import Controls
from ldm_pipe.doors.edit import Edit
from ldm_pipe.doors.hallucinations import Filter
from ldm_pipe.doors.hires import Hires
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.doors.patches import Patches
from ldm_pipe.doors.restoration import PLAIN, Inpainting, Restoration
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.flags import SETTINGS, WITH_REPLAY, WITH_SHOW, Flags
from ldm_pipe.looking import attention_maps
from ldm_pipe.looking.flags import Looking
from ldm_pipe.settings import Settings, check_attention, check_device, check_dtype, check_offload, check_sides


@dataclass(frozen=True)
class Request(Flags):
    """The flags of `generate`, read: what each of them asks for, checked."""

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> Request:
        """From the flags that were given; `config` names a TOML file whose values they win over."""
        flags = dict(flags)
        path = flags.pop("config", None)
        below = inputs.config(path) if path is not None else {}
        request = strict.build(cls, below, f"--config {path!r}")
        hints = get_type_hints(cls)
        request = replace(request, **{n: strict.coerce(v, hints[n], f"--{n.replace('_', '-')}") for n, v in flags.items()})
        if request.verify and request.replay is None:
            raise UsageError("--verify goes with --replay: --replay IMAGE --verify")
        for door, taken in (("replay", WITH_REPLAY), ("show", WITH_SHOW)):
            other = [n for n in (*flags, *below) if n not in taken]
            if getattr(request, door) is not None and other:
                raise UsageError(f"--{door} takes no --{other[0].replace('_', '-')}: what made the image stands in its recipe")
        return request

    def texts(self) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
        """The prompts, from --prompt ("-" is standard input) and --prompts, and the seeds that a .jsonl file gives them."""
        if self.edit is not None:
            if self.prompt or self.prompts is not None or self.init_image is not None:
                raise UsageError("--edit holds both prompts; --prompt, --prompts and --init-image do not go with it")
            edit = self.edited()
            if self.num_images > 1 and self.input is not None and edit.inversion != "dpm_encoder":
                drawn = "--set edit.inversion=dpm_encoder draws different ones"
                raise UsageError(f"--num-images: inversion {edit.inversion} gives the same image for every seed; {drawn}")
            self._check_grammar((edit.source, edit.target))
            return (edit.source, edit.target), None
        given = [sys.stdin.read().strip() if p == "-" else p for p in self.prompt]
        rows: list[tuple[str, int | None]] = [(p, None) for p in given]
        rows += inputs.rows(self.prompts) if self.prompts is not None else []
        if self.prompts is not None and len(rows) == len(given):
            raise UsageError(f"--prompts {self.prompts!r} holds no prompt")
        if not rows and (self.restore is not None or self.image_prompt is not None):
            rows = [("", None)]
        if not rows:
            raise UsageError('--prompt is needed, such as --prompt "a fox on a blue background"')
        self._check_grammar([p for p, _ in rows])
        seeds = [s for _, s in rows if s is not None]
        if seeds and self.seed is not None:
            raise UsageError(f"--seed and the seeds in --prompts {self.prompts!r} exclude each other")
        if seeds and len(seeds) < len(rows):
            raise UsageError(f"--prompts {self.prompts!r}: give every prompt a seed, or none")
        return tuple(p for p, _ in rows), tuple(seeds) or None

    def _check_grammar(self, prompts: Sequence[str]) -> None:
        """Raise UsageError on weights and nesting that cannot be, before a model is loaded."""
        if not self.plain_prompt:
            for prompt in prompts:
                grammar.parse(prompt)
            grammar.parse(self.negative_prompt, joins=False)

    def settings(self, seeds: tuple[int, ...] | None) -> dict[str, Any]:
        """The keywords of the pipeline. Raises UsageError on any that is wrong."""
        found: dict[str, Any] = {n: getattr(self, n) for n in SETTINGS} | {"seeds": seeds}
        found |= {f"{kind}_set": self.fields(kind) for kind in ("sampler", "spacing")}
        self.restored()
        self.patches()
        self.pictured()
        self.controls()
        self.adapters()
        self.enlarged()
        if (self.fields("edit") or self.fields("inversion")) and self.edit is None:
            raise UsageError('--set edit... and inversion... go with --edit "SOURCE -> TARGET"')
        settings = Settings(**found)
        start = self.init_image if self.edit is None else self.input
        if start is None and (self.mask is not None or self.strength is not None):
            raise UsageError("--mask and --strength go with --init-image FILE, or with --edit and --input FILE")
        check_device(self.device)
        check_dtype(self.dtype)
        check_attention(self.attention)
        check_offload(self.offload)
        attention_maps.check_folder(self.attention_maps)
        check_sides(settings, inputs.factor(self.model))
        if self.guide is not None:
            if self.guidance_scale is not None:
                raise UsageError("--guide and --guidance-scale exclude each other; write the scale as cfg(5) in --guide")
            guide.calls(self.guide)
        if self.spacing == "file":
            found["spacing_set"] = level_file.filled_in(found["spacing_set"])
        for kind in ("sampler", "spacing"):
            if found[kind] is not None:
                _check_fields(kind, found[kind], found[f"{kind}_set"])
        for _ in self.looking().runs(found):
            pass  # every combination is checked
        return {**found, "num_images": self.filtered().drawn(settings.num_images)}

    def looking(self) -> Looking:
        """What --record, --preview and --sweep ask for."""
        if self.sweep and self.grid:
            raise UsageError("--sweep writes a sheet of its own; --grid does not go with it")
        return Looking(self.record, self.preview, self.sweep, self.force, self.preview_decoder)

    def fields(self, wanted: str) -> dict[str, str]:
        """The fields of one kind of method that --set gives. Raises UsageError on what is not of the form."""
        found = {}
        for item in self.set:
            key, equals, value = item.partition("=")
            kind, dot, name = key.partition(".")
            if not (equals and dot and kind in ("sampler", "spacing", "edit", "inversion", "restore", "control", "hires")):
                hint = f"; did you mean sampler.{item}?" if equals and not dot else ""
                raise UsageError(f"--set {item!r} is not of the form sampler.field=value or spacing.field=value{hint}")
            if kind == wanted:
                found[name] = value
        return found

    def enlarged(self) -> Hires | None:
        """What --hires asks for."""
        if self.hires is not None and any(v is not None for v in (self.edit, self.restore, self.init_image, self.input)):
            raise UsageError("--hires goes with a prompt alone, not with a picture to start from")
        return Hires.of(self.hires, self.fields("hires"))

    def filtered(self) -> Filter:
        """What --filter-hallucinations asks for."""
        pictures = (self.edit, self.restore, self.init_image, self.input, self.hires, self.record, self.attention_maps)
        if self.filter_hallucinations is None:
            return Filter()
        if self.sweep or any(v is not None for v in pictures):
            raise UsageError("--filter-hallucinations goes with a prompt alone: no picture, --hires, --sweep, --record")
        return Filter(self.filter_hallucinations)

    def pictured(self) -> ImagePrompt | None:
        """What --image-prompt asks for."""
        if self.image_prompt is None:
            if self.noise_level is not None:
                raise UsageError("--noise-level goes with --image-prompt FILE")
            return None
        if self.edit is not None or self.restore is not None:
            raise UsageError("--image-prompt goes with a prompt, not with --edit or --restore")
        return ImagePrompt(self.noise_level or 0)

    def controls(self) -> Controls:
        """What --control asks for."""
        return Controls.of(self.control, len(self.control_image), self.control_scale, self.fields("control"))

    def adapters(self) -> Adapters:
        """What --lora and --embedding ask for."""
        return replace(Adapters.of(self.lora, self.embedding), partial=self.allow_partial)

    def patches(self) -> Patches:
        """What --speed and --patch ask for."""
        return Patches.of(self.speed, self.patch)

    def restored(self) -> Restoration | None:
        """What --restore asks for."""
        fields = self.fields("restore")
        if self.edit is not None and self.restore is not None:
            raise UsageError("--edit and --restore exclude each other")
        inpaints = self.inpainted() is not None
        if self.method is not None and self.edit is None and self.restore is None and not inpaints:
            raise UsageError("--method goes with --edit, --restore, --mask or --outpaint")
        if self.restore is None or self.input is None:
            if self.restore is not None or (self.input is not None and self.edit is None) or (fields and not inpaints):
                raise UsageError('--restore and --input go together: --restore "pool(4)" --input small.png')
            return None
        deviation = strict.coerce(fields.pop("deviation", 0.0), float, "--set restore.deviation")
        return Restoration(self.restore, self.method or "dps", fields, deviation)

    def inpainted(self) -> Inpainting | None:
        """What --outpaint, or --mask with a --method, asks for."""
        if self.outpaint is not None and (self.init_image is None or self.mask is not None):
            raise UsageError("--outpaint goes with --init-image FILE and without --mask: the border is what is drawn")
        if self.edit is not None or self.init_image is None or (self.outpaint is None and self.mask is None):
            return None
        if self.restore is not None:
            raise UsageError('--restore and --mask exclude each other; --restore "mask(FILE)" keeps what is white')
        fields = self.fields("restore")
        if self.outpaint is None and self.method in (None, PLAIN) and not fields:
            return None if self.method is None else Inpainting()
        deviation = strict.coerce(fields.pop("deviation", 0.0), float, "--set restore.deviation")
        return Inpainting(self.method or PLAIN, fields, deviation, self.outpaint or "")

    def edited(self) -> Edit:
        """What --edit asks for."""
        method = self.method or "prompt_to_prompt"
        return Edit.of(str(self.edit), self.fields("edit"), method, self.fields("inversion"))


def _check_fields(kind: str, name: str, given: Mapping[str, Any]) -> None:
    fields = [n for n, _ in registry.entry(kind, name).fields]
    for field in given:
        if not fields:
            raise UsageError(f"--set {kind}.{field}: {kind} {name} has no fields")
        if field not in fields:
            raise UsageError("--set " + unknown(f"field of {kind} {name}", field, fields))
