"""The parts of a model folder, each read whole or refused: networks, text encoders, tokenizers, the codec."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ldm_pipe import tokens, weights
from ldm_pipe.codec import Codec, DCCodec, KLCodec
from ldm_pipe.errors import ModelError
from ldm_pipe.families import class_of
from ldm_pipe.text import ClipTower, MaskedTower, TextEncoder

# Networks of our own, which read the same files: they start in a tenth of the time. What they do not know they leave.
LIGHT = {
    "UNet2DConditionModel": "ldm_pipe.networks.light_unet:UNet",
    "AutoencoderKL": "ldm_pipe.networks.light_vae:VAE",
    "CLIPTextModel": "ldm_pipe.networks.light_clip:ClipTextModel",
    "CLIPTextModelWithProjection": "ldm_pipe.networks.light_clip:with_projection",
}
LONGEST_JSON = 4 * 2**20
TABLES, LARGEST_TABLE = ("sample_size", "pos_embed_max_size"), 512  # sides of tables of positions, computed while building
WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
CODECS: dict[str, Any] = {"AutoencoderKL": KLCodec, "AutoencoderDC": DCCodec}


class Made(NamedTuple):
    """What a family's file puts together. patch: latent pixels of a side that the network takes together; embeds: the network
    is told the guidance scale and needs no second branch; inserts: what of a picture goes behind x as further channels
    ("masked": a mask and the picture without it, "picture": the picture), None where nothing does. defaults: what this model
    is run with instead of its family's defaults."""

    network: Any
    text: TextEncoder
    codec: Codec
    patch: int = 1
    embeds: bool = False
    inserts: str | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Parts:
    """A folder in diffusers' layout. index: its model_index.json. words: what its text encoder knows, where that is a closed
    list. guidance: the scale to assume where a network wants to be told one and none is given."""

    folder: Path
    index: Mapping[str, Any]
    words: tuple[str, ...] = ()
    guidance: float = 7.5
    loaded: dict[str, Any] = field(default_factory=dict)

    def has(self, part: str) -> bool:
        """Does the index name a class for this part?"""
        return class_of(self.index, part) is not None

    def network(self, part: str) -> Any:
        """One network in fp32: the light one where config.json asks only for what that one knows, else the class of the index.

        Either way its every tensor is read from safetensors, no tensor is left over, and every weight is finite.
        """
        if part not in self.loaded:
            self.loaded[part] = self._read(part)
        return self.loaded[part]

    def _read(self, part: str) -> Any:
        place, (library, name) = self.folder / part, str(class_of(self.index, part)).split(".")
        if (place / "config.json").is_file():
            config = read_json(place / "config.json")
            weights.plausible(config, f"{self.folder.name}/{part}/config.json")
            file = place / WEIGHTS[library]
            if name in LIGHT and file.is_file() and not Path(f"{file}.index.json").exists():
                module, _, build = LIGHT[name].partition(":")
                light = importlib.import_module(module)
                ours = config.get("_class_name", name) == name and weights.known(light.Config, config)
                if ours:
                    made = getattr(light, build)
                    return weights.read(file, ours.parts, lambda: made(ours), getattr(light, "renamed", str))
        return foreign(place, library, name)

    def codec(self) -> Codec:
        """Of the part `vae`."""
        vae = self.network("vae")
        scale, where = vae.config.scaling_factor, f"{self.folder.name}/vae/config.json"
        if not (isinstance(scale, int | float) and math.isfinite(scale) and scale != 0):
            raise ModelError(f"{where}: scaling_factor is {scale!r:.40}; it takes a finite number other than 0")
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ModelError(f"{where}: latents_mean is not supported")
        codec: Codec = CODECS[str(class_of(self.index, "vae")).split(".")[1]](vae)
        return codec

    def tokenizer(self, part: str, vocabulary: int) -> tokens.Tokenizer:
        """CLIP's own where the folder holds no more than that, else whatever transformers makes of it."""
        place, name = self.folder / part, str(class_of(self.index, part)).split(".")[1]
        with weights.named(place):
            light = tokens.read(place, vocabulary) if name.startswith("CLIP") else None
            return light or _foreign_tokenizer(place, name)

    def clip(self, suffix: str = "") -> ClipTower:
        """A CLIP text model and its tokenizer, `text_encoder` + suffix."""
        encoder = self.network(f"text_encoder{suffix}")
        return ClipTower(encoder, self.tokenizer(f"tokenizer{suffix}", encoder.config.vocab_size))

    def masked(self, suffix: str, window: int) -> MaskedTower:
        """A T5 or Gemma text model and its tokenizer."""
        encoder = self.network(f"text_encoder{suffix}")
        return MaskedTower(encoder, self.tokenizer(f"tokenizer{suffix}", encoder.config.vocab_size), window)


def foreign(place: Path, library: str, name: str) -> Any:
    """The network as its own library reads it: split files, and whatever the light ones do not know."""
    import torch

    where = f"{place.parent.name}/{place.name}"
    with weights.named(place), quiet():
        cls = getattr(importlib.import_module(library), name)
        held = weights.held(place, WEIGHTS[library])
        config = read_json(place / "config.json")
        _asks_no_more(config, held, where)
        with torch.device("meta"):
            empty = cls.from_config(config) if library == "diffusers" else cls(cls.config_class.from_dict(config))
        asked = sum(p.numel() for p in empty.parameters())
        if asked > 1.1 * sum(held.values()) + 10_000:
            raise ModelError(f"{where}: config.json asks for {asked:,} parameters, the files hold {sum(held.values()):,}")
        found, report = cls.from_pretrained(
            place, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report.get(fault) or ()))
        if keys:
            raise ModelError(f"{where}: {fault.split('_')[0]} tensor {keys[0]!r} and {len(keys) - 1} more")
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


def _foreign_tokenizer(place: Path, name: str) -> tokens.FromTransformers:
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
        yield
    finally:
        for log, verbosity, bars in levels:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises ModelError naming the file."""
    if not path.is_file():
        raise ModelError(f"{path.resolve().parent.name} has no {path.name}; a model is a folder in diffusers' layout")
    if path.stat().st_size > LONGEST_JSON:
        raise ModelError(f"{path.parent.name}/{path.name} is longer than {LONGEST_JSON} bytes; no configuration is")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read as JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.parent.name}/{path.name} holds {type(found).__name__}, not an object")
    return found
