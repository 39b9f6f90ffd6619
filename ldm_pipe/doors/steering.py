"""What a `--control` names, read: ControlNets and T2I-Adapters in diffusers' layout.

A network that is new here is a row in `MAKERS`: the class that its config.json names, and the patch that is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe.errors import ModelError, UsageError, check_interval, unknown
from ldm_pipe.hints import PREPARE

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.patch import Patch

FILE = "diffusion_pytorch_model.safetensors"
OWNERS = {
    "guess": ("ControlNetModel", "ControlNetUnionModel", "LevelControlNet"),
    "mode": ("ControlNetUnionModel", "FluxControlNetModel"),
}


@dataclass(frozen=True)
class Window:
    """How a control acts. lo, hi: while the noise u is in lo <= u < hi. guess: without the prompt's help (ControlNet).
    prepare: what is made of the picture first, at the size of the image: "canny", "grey" or nothing. mode: which kind of
    picture it is, for a union network: a word such as "depth" for one of Stable Diffusion XL, a number for one of Flux; of
    several controls one each, between commas, or one for all."""

    lo: float = 0.0
    hi: float = 1.0
    guess: bool = False
    prepare: str = ""
    mode: int | str | None = None

    def __post_init__(self) -> None:
        check_interval("control", self.lo, self.hi)
        if self.prepare and self.prepare not in PREPARE:
            raise UsageError("--set control.prepare: " + unknown("way to prepare a picture", self.prepare, PREPARE))

    def of(self, number: int, count: int) -> Window:
        """That of one of several controls, with its own mode. Raises UsageError where there are more or fewer modes."""
        modes = self.mode.split(",") if isinstance(self.mode, str) else [self.mode]
        if len(modes) == 1:
            return self
        if len(modes) != count:
            got = f"got {len(modes)} for {count}"
            raise UsageError(f"--set control.mode={self.mode}: give one for each --control, or one; {got}")
        word = str(modes[number]).strip()
        return replace(self, mode=int(word) if word.isdecimal() else word or None)


@dataclass(frozen=True, eq=False)
class Asked:
    """A picture, where the control reads one, and what is to be made of it, for an image of `size` (width, height) on a device,
    in a dtype, under a codec."""

    picture: Image | None
    scale: float
    window: Window
    size: tuple[int, int]
    device: Any
    dtype: Any
    codec: Any

    def hint(self) -> Tensor:
        """[1,3,H,W] in -1..1, of the size of the image, prepared."""
        from ldm_pipe.editing.source import Source
        from ldm_pipe.image import to_tensor

        assert self.picture is not None
        fitted = Source(self.picture).fitted(*self.size).picture
        return to_tensor([PREPARE[self.window.prepare](fitted) if self.window.prepare else fitted]).to(self.device)

    def shown(self) -> Tensor:
        """The hint in 0..1, in the dtype of the run."""
        return (self.hint() / 2 + 0.5).to(self.dtype)

    @property
    def acts(self) -> dict[str, Any]:
        """The fields that every control has."""
        return {"scale": self.scale, "lo": self.window.lo, "hi": self.window.hi}


@dataclass(frozen=True, eq=False)
class Found:
    """name: what the recipe calls it. sums: SHA-256 of its files, as the recipe has them. patch: what is made of it."""

    name: str
    sums: Mapping[str, str]
    patch: Callable[[Asked], Patch]


def read(folder: Path) -> Found:
    """The network of a folder. Raises ModelError on one that holds none."""
    import torch

    from ldm_pipe import configs, files, parts

    if not (str(folder) and folder.is_dir()):
        other = "; a file of an IP-Adapter is named as ip_adapter(FILE)" if folder.suffix == ".safetensors" else ""
        wanted = f"give one in diffusers' layout, such as a ControlNet's{other}"
        raise ModelError(f"--control {str(folder)!r:.120} is not a folder; {wanted}")
    config = parts.read_json(folder / "config.json")
    configs.plausible(config, f"{folder.name}/config.json")
    name = str(config.get("_class_name"))
    if name not in MAKERS:
        raise ModelError(f"{folder.name}/config.json: _class_name is {name!r:.60}; --control takes {' or '.join(MAKERS)}")
    network = parts.foreign(folder, "diffusers", name)
    sums = {"sha256": files.sha256(folder / FILE) if (folder / FILE).is_file() else ""}

    def patch(asked: Asked) -> Patch:
        for field, owners in OWNERS.items():
            if getattr(asked.window, field) not in (None, False) and name not in owners:
                raise UsageError(f"--set control.{field} goes with a {' or a '.join(owners)}, and {folder.name} is a {name}")
        torch.nn.Module.to(network, asked.device, asked.dtype)  # diffusers' own warns of parts that none of these has
        return MAKERS[name](network, asked)

    return Found(folder.name, sums, patch)


def _controlnet(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.controlnet import ControlNet

    return ControlNet(network, asked.shown(), guess=asked.window.guess, kind=str(asked.window.mode or ""), **asked.acts)


def _t2i_adapter(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.t2i_adapter import T2IAdapter

    hint = asked.shown()
    return T2IAdapter.of(network, hint.mean(1, keepdim=True) if network.config.in_channels == 1 else hint, **asked.acts)


def _sd3(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.sd3_controlnet import SD3ControlNet

    return SD3ControlNet.of(network, asked.codec, asked.hint(), **asked.acts)


def _flux(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.flux_controlnet import FluxControlNet

    mode = asked.window.mode
    if isinstance(mode, str):
        raise UsageError(f"--set control.mode={mode:.40}: a network of Flux takes a number, which its author's page tells")
    return FluxControlNet.of(network, asked.codec, asked.hint(), mode=mode, **asked.acts)


def _sana(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.sana_controlnet import SanaControlNet

    return SanaControlNet.of(network, asked.codec, asked.hint(), **asked.acts)


MAKERS: dict[str, Callable[[Any, Asked], Patch]] = {
    "ControlNetModel": _controlnet,
    "T2IAdapter": _t2i_adapter,
    "SD3ControlNetModel": _sd3,
    "FluxControlNetModel": _flux,
    "SanaControlNetModel": _sana,
    "ControlNetUnionModel": _controlnet,
    "LevelControlNet": _controlnet,
}
