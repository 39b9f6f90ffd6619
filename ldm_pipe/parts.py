"""The parts of a model folder, each read whole or refused: networks, text encoders, tokenizers, the codec."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ldm_pipe import configs, tokens, weights
from ldm_pipe.codec import Codec, DCCodec, KLCodec, TinyCodec
from ldm_pipe.configs import read_json as read_json
from ldm_pipe.errors import ModelError
from ldm_pipe.families import class_of
from ldm_pipe.text import ClipTower, MaskedTower, TextEncoder
from ldm_pipe.vision import MEAN, STD, ImageTower

# Networks of our own, which read the same files: they start in a tenth of the time. What they do not know they leave.
LIGHT = {
    "UNet2DConditionModel": "ldm_pipe.networks.light_unet:UNet",
    "AutoencoderKL": "ldm_pipe.networks.light_vae:VAE",
    "CLIPTextModel": "ldm_pipe.networks.light_clip:ClipTextModel",
    "CLIPTextModelWithProjection": "ldm_pipe.networks.light_clip:with_projection",
}
TABLES, LARGEST_TABLE = ("sample_size", "pos_embed_max_size"), 512  # sides of tables of positions, computed while building
OURS = {"LevelControlNet": "ldm_pipe.networks.level_controlnet"}  # classes that keep diffusers' ways and are not in it
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
CODECS: dict[str, Any] = {"AutoencoderKL": KLCodec, "AutoencoderDC": DCCodec, "AutoencoderTiny": TinyCodec}


class Made(NamedTuple):
    """What a family's file puts together. patch: latent pixels of a side that the network takes together; embeds: the network
    is told the guidance scale and needs no second branch; inserts: what of a picture goes behind x as further channels
    ("masked": a mask and the picture without it, "picture": the picture), None where nothing does. defaults: what this model
    is run with instead of its family's defaults. vectors: makes of pictures what the network is told of them, where it
    was trained with pictures (`networks.unclip`)."""

    network: Any
    text: TextEncoder
    codec: Codec
    patch: int = 1
    embeds: bool = False
    inserts: str | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})
    vectors: Any = None


@dataclass(frozen=True, eq=False)
class Parts:
    """A folder in diffusers' layout. index: its model_index.json. words: what its text encoder knows, where that is a closed
    list. guidance: the scale to assume where a network wants to be told one and none is given. how: weights are read."""

    folder: Path
    index: Mapping[str, Any]
    words: tuple[str, ...] = ()
    guidance: float = 7.5
    loaded: dict[str, Any] = field(default_factory=dict)
    how: weights.How = weights.STRICT

    def has(self, part: str) -> bool:
        """Does the index name a class for this part?"""
        return class_of(self.index, part) is not None

    def network(self, part: str) -> Any:
        """One network: the light one where config.json asks only for what that one knows, else the class of the index.

        Either way its every tensor is read from safetensors, no tensor is left over, and every weight is finite.
        """
        if part not in self.loaded:
            self.loaded[part] = self._read(part)
        return self.loaded[part]

    def _read(self, part: str) -> Any:
        place, (library, name) = self.folder / part, str(class_of(self.index, part)).split(".")
        if (place / "config.json").is_file():
            config = read_json(place / "config.json")
            configs.plausible(config, f"{self.folder.name}/{part}/config.json")
            file = place / WEIGHTS[library]
            if name in LIGHT and file.is_file() and not Path(f"{file}.index.json").exists():
                module, _, build = LIGHT[name].partition(":")
                light = importlib.import_module(module)
                ours = config.get("_class_name", name) == name and configs.known(light.Config, config)
                if ours:
                    made = getattr(light, build)
                    renamed, how = getattr(light, "renamed", str), self.how_of(part)
                    return weights.read(file, ours.parts, lambda: made(ours), renamed, how)
        return foreign(place, library, name, self.how_of(part))

    def how_of(self, part: str) -> weights.How:
        """How a part is read: a codec stays in fp32, which it may have to work in."""
        return replace(self.how, dtype=weights.STRICT.dtype) if part == "vae" else self.how

    def codec(self) -> Codec:
        """Of the part `vae`."""
        name = str(class_of(self.index, "vae")).split(".")[1]
        return _codec(self.network("vae"), name, f"{self.folder.name}/vae/config.json")

    def tokenizer(self, part: str, vocabulary: int) -> tokens.Tokenizer:
        """CLIP's own where the folder holds no more than that, else whatever transformers makes of it."""
        place, name = self.folder / part, str(class_of(self.index, part)).split(".")[1]
        with weights.named(place):
            light = tokens.read(place, vocabulary) if name.startswith("CLIP") else None
            return light or foreign_tokenizer(place, name)

    def clip(self, suffix: str = "") -> ClipTower:
        """A CLIP text model and its tokenizer, `text_encoder` + suffix."""
        encoder = self.network(f"text_encoder{suffix}")
        return ClipTower(encoder, self.tokenizer(f"tokenizer{suffix}", encoder.config.vocab_size))

    def masked(self, suffix: str, window: int) -> MaskedTower:
        """A T5 or Gemma text model and its tokenizer."""
        encoder = self.network(f"text_encoder{suffix}")
        return MaskedTower(encoder, self.tokenizer(f"tokenizer{suffix}", encoder.config.vocab_size), window)


def codec(place: Path) -> Codec:
    """The autoencoder of a folder of its own, in fp32."""
    config, where = read_json(place / "config.json"), f"{place.name}/config.json"
    configs.plausible(config, where)
    name = config.get("_class_name")
    if name not in CODECS:
        raise ModelError(f"{where}: _class_name is {name!r:.60}; an autoencoder is one of {', '.join(CODECS)}")
    return _codec(foreign(place, "diffusers", str(name)), str(name), where)


def _codec(vae: Any, name: str, where: str) -> Codec:
    scale = vae.config.scaling_factor
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale != 0):
        raise ModelError(f"{where}: scaling_factor is {scale!r:.40}; it takes a finite number other than 0")
    if getattr(vae.config, "latents_mean", None) is not None:
        raise ModelError(f"{where}: latents_mean is not supported")
    found: Codec = CODECS[name](vae)
    return found


def vision(place: Path, prepared: Path | None = None) -> ImageTower:
    """The image encoder of a folder in transformers' layout, in fp32. prepared: the folder whose preprocessor_config.json says
    how pictures are normalised, where it has one; `place` by default."""
    config = read_json(place / "config.json")
    configs.plausible(config, f"{place.name}/config.json")
    if "vision_config" in config:
        how = "the folder of its vision model alone, as save_pretrained writes it, is what is read"
        raise ModelError(f"{place.name}/config.json is that of pictures and text together; {how}")
    whole = config.get("model_type") == "siglip_vision_model"
    encoder = foreign(place, "transformers", "SiglipVisionModel" if whole else "CLIPVisionModelWithProjection")
    file = (prepared or place) / "preprocessor_config.json"
    said = read_json(file) if file.is_file() else {}
    usual = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if whole else {"mean": MEAN, "std": STD}
    given = [said.get(f"image_{name}", list(values)) for name, values in usual.items()]
    if not all(isinstance(v, list) and len(v) == 3 and all(type(n) in (int, float) for n in v) for v in given) or 0 in given[1]:
        raise ModelError(f"{file.parent.name}/{file.name}: image_mean and image_std take three numbers each, no std of 0")
    return ImageTower(encoder, int(encoder.config.image_size), tuple(given[0]), tuple(given[1]), whole)


def foreign(place: Path, library: str, name: str, how: weights.How = weights.STRICT) -> Any:
    """The network as its own library reads it: split files, and whatever the light ones do not know."""
    import torch

    where = f"{place.parent.name}/{place.name}"
    with weights.named(place), quiet():
        cls = getattr(importlib.import_module(OURS.get(name, library)), name)
        held = weights.held(place, WEIGHTS[library])
        config = read_json(place / "config.json")
        _asks_no_more(config, held, where)
        with torch.device("meta"):
            empty = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
        asked = sum(p.numel() for p in empty.parameters())
        if asked > 1.1 * sum(held.values()) + 10_000:
            raise ModelError(f"{where}: config.json asks for {asked:,} parameters, the files hold {sum(held.values()):,}")
        rest: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        if how.faults is not None:
            rest |= {"ignore_mismatched_sizes": True} | ({"low_cpu_mem_usage": False} if library == "diffusers" else {})
        found, report = cls.from_pretrained(place, torch_dtype=how.dtype, **rest)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [str(k[0] if isinstance(k, tuple) else k) for k in report.get(fault) or ()]
        weights.refuse(where, fault.split("_")[0], keys, how.faults)
        for key in keys if fault != "unexpected_keys" else ():  # left as memory that nobody wrote
            owner, _, leaf = key.rpartition(".")
            tensor = getattr(found.get_submodule(owner), leaf)
            tensor.data = weights.drawn(key, tuple(tensor.shape)).to(how.dtype)
    weights.finite(found, where)
    return found.eval().requires_grad_(False)


def _asks_no_more(config: Mapping[str, Any], held: Mapping[str, int], where: str) -> None:
    """Raise ModelError where a configuration asks for more layers than the files have tensors, or for what is not supported."""
    for name, value in config.items():
        if "layers" in name and isinstance(value, int) and value > len(held):
            raise ModelError(f"{where}: config.json asks for {value} {name}, the files have {len(held)} tensors")
        if name in TABLES and where.endswith("/transformer") and isinstance(value, int) and value > LARGEST_TABLE:
            raise ModelError(f"{where}: config.json holds {name} {value}; it takes at most {LARGEST_TABLE}")
    for name in ("quantization_config", "auto_map"):
        if config.get(name):
            raise ModelError(f"{where}: config.json holds {name}, which is not supported; take the plain weights")


def foreign_tokenizer(place: Path, name: str) -> tokens.FromTransformers:
    """The tokenizer of a folder as transformers reads it."""
    with quiet():
        import transformers

        found = getattr(transformers, name).from_pretrained(place, local_files_only=True)
        found.padding_side = "right"  # Gemma's own is left, every family here was trained with right
        return tokens.FromTransformers(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own bars and warnings off: what they warn of is an error here. Nothing reaches for a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    levels = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (of_diffusers, of_transformers)]
    try:
        for log, _, _ in levels:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what the libraries will rename in themselves
            yield
    finally:
        for log, verbosity, bars in levels:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
