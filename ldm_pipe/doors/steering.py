"""What a `--control` names, read: ControlNets and T2I-Adapters in diffusers' layout, IP-Adapters from their files.

A network that is new here is a row in `MAKERS`: the class that its config.json names, and the patch that is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_pipe.errors import ModelError, UsageError, check_interval, unknown
from ldm_pipe.hints import PREPARE

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.patch import Patch

FILE = "diffusion_pytorch_model.safetensors"
PICTURE = re.compile(r"\s*ip_adapter\s*\(\s*([^,()]+?)\s*(?:,\s*(?:image_encoder\s*=\s*)?([^,()]+?)\s*)?\)\s*")


@dataclass(frozen=True)
class Window:
    """How a control acts. lo, hi: while the noise u is in lo <= u < hi. guess: without the prompt's help (ControlNet).
    prepare: what is made of the picture first, at the size of the image: "canny", "grey" or nothing. mode: which kind of
    picture it is, for a union network of Flux."""

    lo: float = 0.0
    hi: float = 1.0
    guess: bool = False
    prepare: str = ""
    mode: int | None = None

    def __post_init__(self) -> None:
        check_interval("control", self.lo, self.hi)
        if self.prepare and self.prepare not in PREPARE:
            raise UsageError("--set control.prepare: " + unknown("way to prepare a picture", self.prepare, PREPARE))


@dataclass(frozen=True, eq=False)
class Asked:
    """A picture and what is to be made of it, for an image of `size` (width, height) on a device, in a dtype, under a codec."""

    picture: Image
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


def image_prompt(text: str) -> tuple[Path, Path] | None:
    """(file, folder of the image encoder) of "ip_adapter(FILE, image_encoder=FOLDER)"; None where the text is no such call.

    The folder is `image_encoder` beside the file where none is given. Raises UsageError on a call that is not of the form.
    """
    found = PICTURE.fullmatch(text)
    if found is None:
        if re.match(r"\s*ip_adapter\s*\(", text):
            raise UsageError(f"--control {text!r:.120} is not of the form ip_adapter(FILE, image_encoder=FOLDER)")
        return None
    file, folder = (None if part is None else Path(part.strip("'\"")) for part in found.groups())
    assert file is not None
    return file, folder or file.parent / "image_encoder"


def read(text: str) -> Found:
    """What a `--control` names. Raises ModelError on a folder or a file that is none."""
    call = image_prompt(text)
    return _folder(Path(text)) if call is None else _ip_adapter(*call)


def _folder(folder: Path) -> Found:
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
        for field, owner in (("guess", "ControlNetModel"), ("mode", "FluxControlNetModel")):
            if getattr(asked.window, field) not in (None, False) and name != owner:
                raise UsageError(f"--set control.{field} goes with a {owner}, and {folder.name} is a {name}")
        torch.nn.Module.to(network, asked.device, asked.dtype)  # diffusers' own warns of parts that none of these has
        return MAKERS[name](network, asked)

    return Found(folder.name, sums, patch)


def _ip_adapter(file: Path, folder: Path) -> Found:
    from ldm_pipe import files, lora, parts
    from ldm_pipe.control.flux_ip_adapter import FluxIPAdapter
    from ldm_pipe.control.ip_adapter import IPAdapter
    from ldm_pipe.networks.image_prompt import ImageAdapter

    adapter = ImageAdapter.of(lora.read(file)[0], file.name)
    if not folder.is_dir():
        raise ModelError(f"{file.name}: {str(folder)!r:.120} is no folder; image_encoder=FOLDER is the CLIP that it reads with")
    tower = parts.vision(folder)
    encoder = folder / parts.WEIGHTS["transformers"]
    sums = {"sha256": files.sha256(file), "image_encoder": files.sha256(encoder) if encoder.is_file() else ""}
    cls: Any = IPAdapter if len(adapter.weights[0]) == 2 else FluxIPAdapter
    return Found(file.name, sums, lambda asked: cls.of(adapter, tower, [asked.picture], **asked.acts))


def _controlnet(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.controlnet import ControlNet

    return ControlNet(network, asked.shown(), guess=asked.window.guess, **asked.acts)


def _t2i_adapter(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.t2i_adapter import T2IAdapter

    hint = asked.shown()
    return T2IAdapter.of(network, hint.mean(1, keepdim=True) if network.config.in_channels == 1 else hint, **asked.acts)


def _sd3(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.sd3_controlnet import SD3ControlNet

    return SD3ControlNet.of(network, asked.codec, asked.hint(), **asked.acts)


def _flux(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.flux_controlnet import FluxControlNet

    return FluxControlNet.of(network, asked.codec, asked.hint(), mode=asked.window.mode, **asked.acts)


def _sana(network: Any, asked: Asked) -> Patch:
    from ldm_pipe.control.sana_controlnet import SanaControlNet

    return SanaControlNet.of(network, asked.codec, asked.hint(), **asked.acts)


MAKERS: dict[str, Callable[[Any, Asked], Patch]] = {
    "ControlNetModel": _controlnet,
    "T2IAdapter": _t2i_adapter,
    "SD3ControlNetModel": _sd3,
    "FluxControlNetModel": _flux,
    "SanaControlNetModel": _sana,
}
