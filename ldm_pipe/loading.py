"""Models into bundles: `load("builtin")`, `load("path/to/diffusers/folder")`."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ldm_pipe import hub, single, strict
from ldm_pipe.codec import Codec
from ldm_pipe.cond import Cond
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.families import FAMILIES, Defaults, family_of
from ldm_pipe.files import sha256
from ldm_pipe.model import Model
from ldm_pipe.parts import Made, Parts, read_json
from ldm_pipe.schedule import defaults_of, path_of
from ldm_pipe.text import TextEncoder

BUILTIN = Path(__file__).resolve().parent / "builtin"
SUMS = "SHA256SUMS"


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded model: network, codec and text encoder, with the defaults of its folder and the digests of its weights.

    family: its name in `families.FAMILIES`. patch: latent pixels of a side that the network takes together. embeds: the
    guidance scale is told to the network, and guidance needs no second branch. adapters: what was merged into it (`adapters`).
    """

    model: Model
    codec: Codec
    text: TextEncoder
    name: str = "model"
    defaults: Defaults = field(default_factory=Defaults)
    digests: Mapping[str, str] = field(default_factory=dict)
    family: str = "sd"
    patch: int = 1
    embeds: bool = False
    inserts: str | None = None
    adapters: tuple[Mapping[str, Any], ...] = ()

    def to(self, device: Any, dtype: Any) -> Bundle:
        """The same bundle on a torch device, the networks in a torch dtype (moved in place)."""
        self.model.to(device=device, dtype=dtype)
        self.model.dtype = dtype
        return replace(self, codec=self.codec.to(device, dtype), text=self.text.to(device, dtype))

    @property
    def multiple(self) -> int:
        """What the sides of an image are multiples of, in pixels."""
        return self.codec.factor * self.patch

    def conditions(self, prompts: Sequence[str], negative: str, scale: float | None = None) -> dict[str, Cond]:
        """The two usual branches of as many images as prompts, "cond" and "uncond". scale: told to a network that wants it."""
        others = [negative] * len(prompts)
        apart = getattr(self.text, "negative", None)  # of families that read a negative prompt in another way
        if apart is None:
            both, half = self.text([*prompts, *others]), len(prompts)
            found = {"cond": both.take(slice(0, half)), "uncond": both.take(slice(half, None))}
        else:
            found = {"cond": self.text(prompts), "uncond": apart(others)}
        if not self.embeds or scale is None:
            return found
        told = torch.full((len(prompts),), scale, device=next(self.model.parameters()).device)
        return {n: replace(c, extras={**c.extras, "guidance": told}) for n, c in found.items()}

    def empty(self, side: int) -> Cond:
        """The condition of an empty prompt for one image of `side` x `side` latent pixels, nothing behind x."""
        further = {"masked": self.codec.channels + 1, "picture": self.codec.channels}.get(self.inserts or "")
        cond = self.text([""])
        if further is None:
            return cond
        return replace(cond, channels=torch.zeros(1, further, side, side, device=next(self.model.parameters()).device))

    def spacing_set(self, width: int, height: int) -> dict[str, Any]:
        """The fields of the default spacing for a size in pixels: a flow's shift may grow with the area."""
        if not self.defaults.area_shift:
            return self.defaults.spacing_set
        low, high, least, most = self.defaults.area_shift
        patches = (height // self.multiple) * (width // self.multiple)
        slope = (high - low) / (most - least)
        return {**self.defaults.spacing_set, "shift": math.exp(low + slope * (patches - least))}


def load(source: str | os.PathLike[str] = "builtin", check: bool = True) -> Bundle:
    """Load "builtin", a folder in diffusers' layout of any family in `families.FAMILIES`, a single file of Stable Diffusion
    1, 2 or XL, or a model that is named as on a hub (`hub`), on the CPU in fp32.

    check: compare the weights with the folder's SHA256SUMS, where it has one (the built-in model does). Nothing is fetched
    that is not named, and no code of a folder is run: safetensors only. Raises ModelError with one sentence on anything that
    does not fit.
    """
    place = BUILTIN if str(source) == "builtin" else Path(source)
    if str(source) and os.path.isfile(place):
        whole = single.read(place)
        return _bundle(whole, whole.configs["scheduler"], place.name, str(source), {})
    if hub.names(str(source)):
        place = hub.fetch(str(source))
    if not (str(source) and os.path.isdir(place)):
        wanted = "give 'builtin', a folder in diffusers' layout or a .safetensors file"
        raise ModelError(f"--model {str(source)!r:.120} is not a folder; {wanted}")
    digests = _sums(place) if check else {}
    parts = Parts(place, read_json(place / "model_index.json"))
    family_of(parts.index, f"{place.name}/model_index.json")
    scheduler = read_json(place / "scheduler" / "scheduler_config.json")
    return _bundle(parts, scheduler, f"{place.name}/scheduler", str(source), digests)


def _bundle(parts: Parts, scheduler: Mapping[str, Any], where: str, name: str, digests: Mapping[str, str]) -> Bundle:
    family = family_of(parts.index, where)
    path, prediction = path_of(scheduler, where)
    usual = defaults_of(scheduler, FAMILIES[family].defaults, where)
    given = _given(parts.folder, usual)
    module = importlib.import_module(f"ldm_pipe.networks.{FAMILIES[family].module}")
    made: Made = module.assemble(replace(parts, words=given.words, guidance=given.guidance_scale))
    model = Model(made.network, path, prediction).eval()
    defaults = _given(parts.folder, replace(usual, **made.defaults))
    return Bundle(model, made.codec, made.text, name, defaults, digests, family, made.patch, made.embeds, made.inserts)


def _given(folder: Path, defaults: Defaults) -> Defaults:
    """The defaults with what the folder's own ldm_pipe.json says instead."""
    path = folder / "ldm_pipe.json"
    if not path.exists():
        return defaults
    config = read_json(path)
    try:
        said = strict.build(Defaults, config, f"{folder.name}/ldm_pipe.json")
    except UsageError as error:
        raise ModelError(str(error)) from error
    if "spacing" in config:
        defaults = replace(defaults, spacing_set={}, area_shift=())
    return replace(defaults, **{f.name: getattr(said, f.name) for f in fields(said) if f.name in config})


def _sums(folder: Path) -> dict[str, str]:
    """The digests of the folder's SHA256SUMS, each checked; {} where there is none."""
    listing = folder / SUMS
    if not listing.exists():
        return {}
    sums = {}
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = (folder / name).resolve()
        if folder.resolve() not in file.parents or not file.is_file():
            raise ModelError(f"{folder.name}/{SUMS} names {name!r}, which is not a file of the folder")
        if sha256(file) != digest:
            raise ModelError(f"{folder.name}/{name} does not have the SHA-256 of {SUMS}; the file is damaged or changed")
        sums[name] = digest
    return sums
