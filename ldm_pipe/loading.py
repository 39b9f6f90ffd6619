"""Models into bundles: `load("builtin")`, `load("path/to/diffusers/folder")`."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ldm_pipe import float8, hub, one_step, single, single_flow, strict, weights
from ldm_pipe.codec import Codec
from ldm_pipe.cond import Cond
from ldm_pipe.configs import LONGEST_JSON
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.families import FAMILIES, Defaults, family_of
from ldm_pipe.files import sha256
from ldm_pipe.model import Model
from ldm_pipe.offload import modules
from ldm_pipe.parts import Made, Parts, read_json
from ldm_pipe.prediction import PREDICTIONS
from ldm_pipe.schedule import defaults_of, path_of
from ldm_pipe.text import TextEncoder, Words

BUILTIN = Path(__file__).resolve().parent / "builtin"
SUMS = "SHA256SUMS"


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded model: network, codec and text encoder, with the defaults of its folder and the digests of its weights.

    family: its name in `families.FAMILIES`. patch: latent pixels of a side that the network takes together. embeds: the
    guidance scale is told to the network, and guidance needs no second branch. adapters: what was merged into it (`adapters`).
    place: the device that its weights visit, where they do not lie on it (`offload`). notes: what a user should know of how it
    was loaded. partial: which tensors its files lacked or had too many, a row for each part and fault (`weights.Fault.row`).
    assumed: nothing was said of its prediction. vectors: makes of pictures what the network is told of them
    (`networks.unclip`), where it was trained with them.
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
    place: Any = None
    notes: tuple[str, ...] = ()
    partial: tuple[Mapping[str, Any], ...] = ()
    assumed: bool = False
    vectors: Any = None

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights lie, or what they visit."""
        return self.place or next(self.model.parameters()).device

    def modules(self) -> dict[str, torch.nn.Module]:
        """The networks of its parts: "network", "codec 1", "text 1", "text 2", ..."""
        rest = [("codec", self.codec), ("text", self.text)]
        return {"network": self.model, **{f"{name} {k}": m for name, part in rest for k, m in enumerate(modules(part), 1)}}

    def to(self, device: Any, dtype: Any) -> Bundle:
        """The same bundle on a torch device, the networks in a torch dtype (moved in place)."""
        self.model.to(device=device, dtype=dtype)
        self.model.dtype = dtype
        return replace(self, codec=self.codec.to(device, dtype), text=self.text.to(device, dtype), place=None)

    @property
    def multiple(self) -> int:
        """What the sides of an image are multiples of, in pixels."""
        return self.codec.factor * self.patch

    def conditions(
        self, prompts: Sequence[Words], negative: Words, scale: float | None = None, chunks: int = 1
    ) -> dict[str, Cond]:
        """The two usual branches of as many images as prompts, "cond" and "uncond". scale: told to a network that wants it.
        chunks: windows of the encoder that all are filled up to."""
        others = [negative] * len(prompts)
        apart = getattr(self.text, "negative", None)  # of families that read a negative prompt in another way
        if apart is None:
            both, half = self.text([*prompts, *others], chunks), len(prompts)
            found = {"cond": both.take(slice(0, half)), "uncond": both.take(slice(half, None))}
        else:
            found = {"cond": self.text(prompts, chunks), "uncond": apart(others, chunks)}
        if not self.embeds or scale is None:
            return found
        told = torch.full((len(prompts),), scale, device=self.device)
        return {n: replace(c, extras={**c.extras, "guidance": told}) for n, c in found.items()}

    def empty(self, side: int) -> Cond:
        """The condition of an empty prompt for one image of `side` x `side` latent pixels, nothing behind x."""
        further = {"masked": self.codec.channels + 1, "picture": self.codec.channels}.get(self.inserts or "")
        cond = self.text([""])
        if further is None:
            return cond
        return replace(cond, channels=torch.zeros(1, further, side, side, device=self.device))

    def predicts(self, side: int = 16) -> frozenset[str]:
        """What its network predicts by its own answers, all names where that cannot be told (`one_step`)."""
        shown = one_step.colours(side * self.codec.factor).to(self.device, next(self.model.parameters()).dtype)
        with torch.no_grad():
            x0 = self.codec.encode(shown).to(torch.promote_types(shown.dtype, torch.float32))
        return one_step.candidates(self.model, self.empty(side).repeat(len(x0)), x0)

    def told(self) -> Bundle:
        """Where the prediction was only assumed, because a single file says nothing of it, that which its answers tell."""
        found, declared = self.predicts() if self.assumed else one_step.ALL, self.model.prediction.name
        if declared in found or len(found) > 1:
            return replace(self, assumed=False)
        (name,) = found
        self.model.prediction = PREDICTIONS[name]
        said = f"the file says nothing of what it predicts; its answers are those of {name}, not of {declared}"
        return replace(self, assumed=False, notes=(*self.notes, said))

    def spacing_set(self, width: int, height: int) -> dict[str, Any]:
        """The fields of the default spacing for a size in pixels: a flow's shift may grow with the area."""
        if not self.defaults.area_shift:
            return self.defaults.spacing_set
        low, high, least, most = self.defaults.area_shift
        patches = (height // self.multiple) * (width // self.multiple)
        slope = (high - low) / (most - least)
        return {**self.defaults.spacing_set, "shift": math.exp(low + slope * (patches - least))}


def load(
    source: str | os.PathLike[str] = "builtin",
    check: bool = True,
    allow_partial: bool = False,
    kind: Callable[[bool], torch.dtype] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Load "builtin", a folder in diffusers' layout of any family in `families.FAMILIES`, a single file of Stable Diffusion
    1, 2, XL or 3 or of Flux, or a model that is named as on a hub (`hub`), on the CPU in fp32.

    check: compare the weights with the folder's SHA256SUMS, where it has one (the built-in model does). allow_partial: tensors
    that are missing, of another shape or not the model's are noted in the bundle's `notes`. kind: of whether the network is
    wide, the dtype that it and the text encoders are read in. tokenizer, text_encoder: folders of what a single file lacks,
    or the file of a T5.
    Nothing is fetched that is not named, and no code of a folder is run: safetensors only. Raises ModelError with one sentence
    on anything that does not fit.
    """
    place = BUILTIN if str(source) == "builtin" else Path(source)
    faults: list[weights.Fault] | None = [] if allow_partial else None
    if str(source) and os.path.isfile(place):
        return _single(place, str(source), faults, kind, [None if f is None else Path(f) for f in (text_encoder, tokenizer)])
    if tokenizer is not None or text_encoder is not None:
        raise UsageError("--tokenizer and --text-encoder go with a single file of SD3 or Flux; a folder has its own")
    if hub.names(str(source)):
        place = hub.fetch(str(source))
    if not (str(source) and os.path.isdir(place)):
        wanted = "give 'builtin', a folder in diffusers' layout or a .safetensors file"
        raise ModelError(f"--model {str(source)!r:.120} is not a folder; {wanted}")
    digests = _sums(place) if check else {}
    parts = Parts(place, read_json(place / "model_index.json"))
    family_of(parts.index, f"{place.name}/model_index.json")
    scheduler = read_json(place / "scheduler" / "scheduler_config.json")
    networks = [file for name in ("unet", "transformer") for file in (place / name).glob("*.safetensors")]
    parts = replace(parts, how=weights.How(_dtype(kind, networks), faults))
    return _bundle(parts, scheduler, f"{place.name}/scheduler", str(source), digests)


def _bundle(parts: Parts, scheduler: Mapping[str, Any], where: str, name: str, digests: Mapping[str, str]) -> Bundle:
    family = family_of(parts.index, where)
    path, prediction = path_of(scheduler, where)
    usual = defaults_of(scheduler, FAMILIES[family].defaults, where)
    given = _given(parts.folder, usual)
    module = importlib.import_module(f"ldm_pipe.networks.{FAMILIES[family].module}")
    made: Made = module.assemble(replace(parts, words=given.words, guidance=given.guidance_scale))
    kind = parts.how.dtype
    model = Model(made.network, path, prediction, None if kind == torch.float32 else kind).eval()
    defaults = _given(parts.folder, replace(usual, **made.defaults))
    found = Bundle(model, made.codec, made.text, name, defaults, digests, family, made.patch, made.embeds, made.inserts)
    faults = parts.how.faults or ()
    return replace(found, vectors=made.vectors, notes=tuple(map(str, faults)), partial=tuple(fault.row for fault in faults))


def _dtype(kind: Callable[[bool], torch.dtype] | None, files: Sequence[Path]) -> torch.dtype:
    return torch.float32 if kind is None else kind(weights.wide(files))


def _single(
    file: Path,
    name: str,
    faults: list[weights.Fault] | None,
    kind: Callable[[bool], torch.dtype] | None,
    folders: Sequence[Path | None],
) -> Bundle:
    """The bundle of a single file."""
    if file.suffix != ".safetensors":
        raise ModelError(f"{file.name} is no .safetensors file; other formats may hold code and are not read")
    names = weights.header(file, alone=True)
    said = tuple(filter(None, [float8.note(file.name, names)]))
    model, how = single_flow.model_of(names), weights.How(_dtype(kind, [file]), faults)
    if model is not None:
        flow = replace(single_flow.read(file, model, *folders), how=how)
        found = _bundle(flow, flow.configs["scheduler"], file.name, name, {})
        return replace(found, notes=(*found.notes, *said, *flow.notes()))
    if any(folders):
        raise UsageError(f"--tokenizer and --text-encoder go with a single file of SD3 or Flux; {file.name} is none")
    whole = replace(single.read(file), how=how)
    found = _bundle(whole, whole.configs["scheduler"], file.name, name, {})
    unsure = replace(found, assumed=not faults, notes=(*found.notes, *said))
    return unsure.told() if kind is None else unsure


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
    if listing.stat().st_size > LONGEST_JSON:
        raise ModelError(f"{folder.name}/{SUMS} is longer than {LONGEST_JSON} bytes; no such list is")
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
