"""`--control FOLDER --control-image FILE`: ControlNets, T2I-Adapters and IP-Adapters, and the plan they steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.doors.picture_prompts import Call
from ldm_pipe.doors.steering import Asked, Found, Window, read
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

SUMS = ("sha256", "image_encoder", "mask", "face")  # of a row: the files that made the image


@dataclass(frozen=True)
class Controls:
    """folders: of the networks, or ip_adapter(FILE, ...), one picture each but for those that read a face, with their scales.
    recorded: what the recipe says of each, on a replay."""

    folders: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    window: Window = field(default_factory=Window)
    recorded: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, folders: Sequence[str], pictures: int, scales: Sequence[float], fields: Mapping[str, Any]) -> Controls:
        """From the flags. Raises UsageError where they do not go together."""
        calls = [Call.of(text) for text in folders]
        wanted = sum(call is None or call.face is None for call in calls)
        if wanted != pictures:
            apart = "" if wanted == len(folders) else f" ({len(folders) - wanted} of them with a face)"
            raise UsageError(f"--control and --control-image go together, got {len(folders)}{apart} and {pictures}")
        if (scales or fields) and not folders:
            raise UsageError("--control-scale and --set control... go with --control FOLDER")
        if scales and len(scales) != len(folders):
            raise UsageError(f"--control-scale: give one for each --control, or none; got {len(scales)} for {len(folders)}")
        window = strict.build(Window, fields, "control")
        for number in range(len(folders)):
            window.of(number, len(folders))
        hints = [n for n in ("guess", "prepare", "mode") if getattr(window, n) not in (None, False, "")]
        if hints and calls and all(calls):
            raise UsageError(f"--set control.{hints[0]}: an IP-Adapter sees the picture as it is")
        return cls(tuple(folders), tuple(scales) or (1.0,) * len(folders), window)

    def again(self, recorded: Sequence[Mapping[str, Any]]) -> Controls:
        """The same folders as a recipe had them. Raises UsageError on another number of them."""
        if len(recorded) != len(self.folders):
            raise UsageError(f"--control: the image was made with {len(recorded)}, got {len(self.folders)}")
        if not recorded:
            return self
        scales = tuple(strict.coerce(row.get("scale"), float, "recipe: scale") for row in recorded)
        given = {f.name: recorded[0][f.name] for f in fields(Window) if f.name in recorded[0]}
        window = strict.build(Window, given, "recipe: control")
        return Controls(self.folders, scales, window, tuple(recorded))

    def applied(self, pipe: Pipeline, whole: Plan, pictures: Sequence[Image]) -> Plan:
        """The plan under these controls. Raises ModelError on a folder that is none, UsageError on one that does not fit."""
        if not self.folders:
            return whole
        from ldm_pipe.image import digest
        from ldm_pipe.plan import patched

        patches, rows, sources = [], [], dict(whole.recorded.get("sources", {}))
        codec, (height, width) = pipe.bundle.codec, whole.shape[1:]
        size = width * codec.factor, height * codec.factor
        left = iter(pictures)
        for k, (folder, scale) in enumerate(zip(self.folders, self.scales, strict=True)):
            call = Call.of(folder)
            found = read(Path(folder)) if call is None else Found(call.file.name, *call.read())
            picture = next(left) if call is None or call.face is None else None
            was = self.recorded[k] if k < len(self.recorded) else found.sums
            if any(was.get(name) != found.sums.get(name) for name in {*SUMS, *found.sums}):
                raise UsageError(f"--control {folder!r} is not the network that the image was made with")
            rows.append({"name": found.name, **found.sums, "scale": scale, **asdict(self.window)})
            sources |= {} if picture is None else {f"control_image_{k + 1}": digest(picture)}
            window = self.window.of(k, len(self.folders))
            patches.append(found.patch(Asked(picture, scale, window, size, pipe.device, pipe.dtype, codec)))
        return replace(
            patched(whole, pipe.bundle.model, patches), recorded={**whole.recorded, "sources": sources, "controls": tuple(rows)}
        )
