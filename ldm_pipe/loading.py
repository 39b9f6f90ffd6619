"""Model folders into bundles: `load("builtin")`, `load("path/to/diffusers/folder")`."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm_pipe import strict, tokens, weights
from ldm_pipe.codec import Codec
from ldm_pipe.errors import ModelError, UsageError
from ldm_pipe.files import sha256
from ldm_pipe.level import Path as NoisePath
from ldm_pipe.model import Model
from ldm_pipe.path import VP, Flow
from ldm_pipe.prediction import PREDICTIONS, Prediction
from ldm_pipe.text import TextEncoder

BUILTIN = Path(__file__).resolve().parent / "builtin"
SUMS = "SHA256SUMS"
# What may be loaded, by the class that a folder names; nothing else is ever imported.
CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
WEIGHTS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model.safetensors") | {"text_encoder": "model.safetensors"}


@dataclass(frozen=True)
class Defaults:
    """What a model is best run with where the user says nothing. size: (width, height) in pixels."""

    size: tuple[int, int] = (512, 512)
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "dpm2m"
    spacing: str = "leading"
    words: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded model: network, codec and text encoder, with the defaults of its folder and the digests of its weights."""

    model: Model
    codec: Codec
    text: TextEncoder
    name: str = "model"
    defaults: Defaults = field(default_factory=Defaults)
    digests: Mapping[str, str] = field(default_factory=dict)

    def to(self, device: Any, dtype: Any) -> Bundle:
        """The same bundle on a torch device, the networks in a torch dtype (moved in place)."""
        self.model.to(device=device, dtype=dtype)
        self.model.dtype = dtype
        return replace(self, codec=self.codec.to(device, dtype), text=self.text.to(device, dtype))


def load(source: str | os.PathLike[str] = "builtin", check: bool = True) -> Bundle:
    """Load "builtin" or a folder in diffusers' layout (U-Net, AutoencoderKL, CLIP text), on the CPU in fp32.

    check: compare the weights with the folder's SHA256SUMS, where it has one (the built-in model does). Nothing is fetched
    and no code of a folder is run: safetensors only. Raises ModelError with one sentence on anything that does not fit.
    """
    folder = BUILTIN if str(source) == "builtin" else Path(source)
    if not (str(source) and os.path.isdir(folder)):
        raise ModelError(f"--model {str(source)!r} is not a folder; give 'builtin' or a folder in diffusers' layout")
    digests = _sums(folder) if check else {}
    index = _json(folder / "model_index.json")
    for part, (library, name) in CLASSES.items():
        if index.get(part) not in ([library, name], (library, name)):
            raise ModelError(f"{folder.name}/model_index.json: {part} is {index.get(part)!r}; it takes [{library!r}, {name!r}]")
    defaults = _defaults(folder)
    path, prediction = path_of(_json(folder / "scheduler" / "scheduler_config.json"), f"{folder.name}/scheduler")
    return _assemble(folder, str(source), defaults, digests, path, prediction)


def _assemble(
    folder: Path, name: str, defaults: Defaults, digests: dict[str, str], path: NoisePath, prediction: Prediction
) -> Bundle:
    from ldm_pipe.codec import KLCodec
    from ldm_pipe.networks import light_clip, light_unet, light_vae
    from ldm_pipe.networks.unet import UNet
    from ldm_pipe.text import ClipText

    unet = _network(folder, "unet", light_unet.Config, light_unet.UNet)
    vae = _network(folder, "vae", light_vae.Config, light_vae.VAE, light_vae.renamed)
    encoder = _network(folder, "text_encoder", light_clip.Config, light_clip.ClipTextModel, light_clip.renamed)
    with weights.named(folder / "tokenizer"):
        tokenizer = tokens.read(folder / "tokenizer", encoder.config.vocab_size) or _foreign_tokenizer(folder)
    words = frozenset(defaults.words) or None
    model = Model(UNet(unet), path, prediction).eval()
    return Bundle(model, KLCodec(vae), ClipText(encoder, tokenizer, words), name, defaults, digests)


def _network(folder: Path, part: str, config_class: Any, build: Any, renamed: Any = str) -> Any:
    """One network in fp32: the light one where config.json asks only for what that one knows, else the class of the index.

    Either way its every tensor is read from safetensors, no tensor is left over, and every weight is finite.
    """
    place, (_, name) = folder / part, CLASSES[part]
    file = place / WEIGHTS[part]
    if (place / "config.json").is_file():
        config = _json(place / "config.json")
        weights.plausible(config, f"{folder.name}/{part}/config.json")
        ours = config.get("_class_name", name) == name and weights.known(config_class, config)
        if ours and file.is_file() and not Path(f"{file}.index.json").exists():
            return weights.read(file, ours.parts, lambda: build(ours), renamed)
    return _foreign(place, part)


def _foreign(place: Path, part: str) -> Any:
    """The network as its own library reads it: split files, and whatever the light ones do not know."""
    import torch

    library, name = CLASSES[part]
    with weights.named(place), _quiet():
        found, report = getattr(importlib.import_module(library), name).from_pretrained(
            place, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, report.get(fault) or ()))
        if keys:
            kind = fault.split("_")[0]
            raise ModelError(f"{place.parent.name}/{place.name}: {kind} tensor {keys[0]!r} and {len(keys) - 1} more")
    weights.finite(found, f"{place.parent.name}/{place.name}")
    return found.eval().requires_grad_(False)


def _foreign_tokenizer(folder: Path) -> tokens.FromTransformers:
    with _quiet():
        from transformers import CLIPTokenizer

        return tokens.FromTransformers(CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def path_of(config: Mapping[str, Any], where: str = "scheduler") -> tuple[NoisePath, Prediction]:
    """Path and prediction from a diffusers scheduler configuration. Raises ModelError on one that is not known."""
    names = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
    flow = config.get("use_flow_sigmas") or str(config.get("_class_name", "")).startswith("FlowMatch")
    kind = names.get(str(config.get("prediction_type", "flow_prediction" if flow else "epsilon")))
    if flow:
        return Flow(), PREDICTIONS["flow"]
    if kind is None:
        raise ModelError(f"{where}: prediction_type {config.get('prediction_type')!r} is not one of {', '.join(names)}")
    return _table(config, where), PREDICTIONS[kind]


def _table(config: Mapping[str, Any], where: str) -> VP:
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":
        path = VP.cosine(steps)
    elif schedule in ("linear", "scaled_linear"):
        path = (VP.linear if schedule == "linear" else VP.scaled_linear)(start, end, steps)
    else:
        raise ModelError(f"{where}: beta_schedule {schedule!r} is not one of linear, scaled_linear, squaredcos_cap_v2")
    return path.zero_terminal() if config.get("rescale_betas_zero_snr") else path


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(f"{path.parent.name} has no {path.name}; a model is a folder in diffusers' layout")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read as JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.parent.name}/{path.name} holds {type(found).__name__}, not an object")
    return found


def _defaults(folder: Path) -> Defaults:
    path = folder / "ldm_pipe.json"
    if not path.exists():
        return Defaults()
    try:
        return strict.build(Defaults, _json(path), f"{folder.name}/ldm_pipe.json")
    except UsageError as error:
        raise ModelError(str(error)) from error


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
