"""`--control FOLDER --control-image FILE`: ControlNets and T2I-Adapters in diffusers' layout, and the plan they steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.errors import ModelError, UsageError, check_interval, unknown
from ldm_pipe.hints import PREPARE

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm_pipe.patch import Patch
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

CLASSES = ("ControlNetModel", "T2IAdapter")
FILE = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Window:
    """How a control acts. lo, hi: while the noise u is in lo <= u < hi. guess: without the prompt's help (ControlNet).
    prepare: what is made of the picture first, at the size of the image: "canny", "grey" or nothing."""

    lo: float = 0.0
    hi: float = 1.0
    guess: bool = False
    prepare: str = ""

    def __post_init__(self) -> None:
        check_interval("control", self.lo, self.hi)
        if self.prepare and self.prepare not in PREPARE:
            raise UsageError("--set control.prepare: " + unknown("way to prepare a picture", self.prepare, PREPARE))


@dataclass(frozen=True)
class Controls:
    """folders: of the networks, one picture each, with their scales. recorded: what the recipe says of each, on a replay."""

    folders: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    window: Window = field(default_factory=Window)
    recorded: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, folders: Sequence[str], pictures: int, scales: Sequence[float], fields: Mapping[str, Any]) -> Controls:
        """From the flags. Raises UsageError where they do not go together."""
        if len(folders) != pictures:
            raise UsageError(f"--control and --control-image go together, got {len(folders)} and {pictures}")
        if (scales or fields) and not folders:
            raise UsageError("--control-scale and --set control... go with --control FOLDER")
        if scales and len(scales) != len(folders):
            raise UsageError(f"--control-scale: give one for each --control, or none; got {len(scales)} for {len(folders)}")
        window = strict.build(Window, fields, "control")
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
        for k, (folder, scale, picture) in enumerate(zip(self.folders, self.scales, pictures, strict=True)):
            network, sums = _load(Path(folder))
            rows.append({"name": Path(folder).name, "sha256": sums, "scale": scale, **asdict(self.window)})
            sources[f"control_image_{k + 1}"] = digest(picture)
            patches.append(self._patch(pipe, whole, network, picture, scale))
        for k, (row, was) in enumerate(zip(rows, self.recorded, strict=False)):
            if row["sha256"] != was.get("sha256"):
                raise UsageError(f"--control {self.folders[k]!r} is not the network that the image was made with")
        return replace(
            patched(whole, pipe.bundle.model, patches), recorded={**whole.recorded, "sources": sources, "controls": tuple(rows)}
        )

    def _patch(self, pipe: Pipeline, whole: Plan, network: Any, picture: Image, scale: float) -> Patch:
        from ldm_pipe.control.controlnet import ControlNet
        from ldm_pipe.control.t2i_adapter import T2IAdapter
        from ldm_pipe.editing.source import Source
        from ldm_pipe.image import to_tensor

        factor, (height, width) = pipe.bundle.codec.factor, whole.shape[1:]
        fitted = Source(picture).fitted(width * factor, height * factor).picture
        hint = to_tensor([PREPARE[self.window.prepare](fitted) if self.window.prepare else fitted]) / 2 + 0.5
        hint, network = hint.to(pipe.device, pipe.dtype), network.to(pipe.device, pipe.dtype)
        lo, hi = self.window.lo, self.window.hi
        if type(network).__name__ == "ControlNetModel":
            return ControlNet(network, hint, scale, lo, hi, self.window.guess)
        if self.window.guess:
            raise UsageError("--set control.guess: a T2I-Adapter has no guess mode")
        if network.config.in_channels == 1:
            hint = hint.mean(1, keepdim=True)
        return T2IAdapter.of(network, hint, scale=scale, lo=lo, hi=hi)


def _load(folder: Path) -> tuple[Any, str]:
    """The network of a folder and the SHA-256 of its weights."""
    from ldm_pipe import files, parts, weights

    if not (str(folder) and folder.is_dir()):
        raise ModelError(
            f"--control {str(folder)!r:.120} is not a folder; give one in diffusers' layout, such as a ControlNet's"
        )
    config = parts.read_json(folder / "config.json")
    weights.plausible(config, f"{folder.name}/config.json")
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ModelError(f"{folder.name}/config.json: _class_name is {name!r:.60}; --control takes {' or '.join(CLASSES)}")
    network = parts.foreign(folder, "diffusers", str(name))
    return network, files.sha256(folder / FILE) if (folder / FILE).is_file() else ""
