"""Single files of SD3 and Flux: the transformer, with or without its codec and text encoders.

What a file lacks comes from a folder in diffusers' layout (`--text-encoder`); CLIP's vocabulary is shipped, that of T5 is not
(`--tokenizer`). SD3 runs without T5. Sizes follow from the tensors, the rest of the configurations is in `published/`.
"""

from __future__ import annotations

import gzip
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe import float8, flow_names, parts, tokens, weights
from ldm_pipe.configs import read_json
from ldm_pipe.errors import ModelError
from ldm_pipe.families import class_of
from ldm_pipe.first_names import vae_name
from ldm_pipe.parts import LIGHT, Parts

PUBLISHED = Path(__file__).resolve().parent / "published"
NETWORK = "model.diffusion_model."
# The block by which a file is known, and where its parts lie.
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "sd3": ("joint_blocks.", {
        "vae": "first_stage_model.", "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.", "text_encoder_3": "text_encoders.t5xxl.transformer.",
    }),
    "flux": ("double_blocks.", {
        "vae": "vae.", "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    }),
}  # fmt: skip
T5 = {"sd3": ("text_encoder_3", "tokenizer_3"), "flux": ("text_encoder_2", "tokenizer_2")}
LEFT = ("position_ids", "logit_scale", "model_sampling.sigmas")


@dataclass(frozen=True, eq=False)
class FlowParts(Parts):
    """The parts of one file; `folder` is the file. model: its name in `published/`; held: per part its tensors' names there,
    by their names without the prefix. beside: a model folder, or T5's own, that has what the file lacks; apart: T5's own file,
    where there is one; words_of: T5's tokenizer."""

    model: str = "sd3"
    configs: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    beside: Path | None = None
    words_of: Path | None = None
    apart: Path | None = None

    def _read(self, part: str) -> Any:
        library, name = str(class_of(self.index, part)).split(".")
        if part not in self.held:
            if self._is_t5_alone and part == T5[self.model][0]:
                return parts.foreign(self._beside, library, name, self.how_of(part))
            return Parts(self._beside, self._index_beside, how=self.how).network(part)
        from safetensors import safe_open

        file = self.apart if self.apart is not None and part == T5[self.model][0] else self.folder
        config, how, where = dict(self.configs[part]), self.how_of(part), f"{file.name} ({part})"
        with parts.quiet():
            build = _builder(library, name, config)
        with safe_open(file, framework="pt") as found:
            read = weights.tensors_as(file, found, how.dtype)
            rows = [
                (n, t, old) for stem, old in self.held[part].items() for n, t in self._present(part, stem, read(old), config)
            ]
        return weights.filled(where, build, {n: t for n, t, _ in rows}, {n: old for n, _, old in rows}, how)

    def _present(self, part: str, stem: str, tensor: Tensor, config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The present names and tensors of one of the file's."""
        if part == "transformer":
            layout = flow_names.LAYOUTS[self.model]
            width = config["num_attention_heads"] * config["attention_head_dim"]
            yield from layout.present(stem, tensor, config["num_layers"], width)
        elif part == "vae":
            new = vae_name(stem, len(config["block_out_channels"]))
            yield new, tensor[:, :, 0, 0] if ".attentions." in new and tensor.ndim == 4 else tensor
        elif part == T5[self.model][0]:
            yield stem, tensor
            if stem == "shared.weight":
                yield "encoder.embed_tokens.weight", tensor
        elif stem != "text_projection.weight" or str(class_of(self.index, part)).endswith("WithProjection"):
            yield stem.removeprefix("text_model."), tensor

    def tokenizer(self, part: str, vocabulary: int) -> tokens.Tokenizer:
        """CLIP's own, which is shipped; T5's from the folder that was given."""
        if part != T5[self.model][1]:
            merges = gzip.decompress((PUBLISHED / "clip_merges.txt.gz").read_bytes()).decode("utf-8")
            return tokens.published(merges, self.configs["pad"][part])
        place = self.words_of or self._beside / part
        with weights.named(place):
            return parts.foreign_tokenizer(place, "T5TokenizerFast")

    def notes(self) -> tuple[str, ...]:
        """What a user should know of what was left out."""
        encoder, _ = T5[self.model]
        if self.has(encoder):
            said = "" if self.apart is None else float8.note(self.apart.name, weights.header(self.apart, alone=True))
            return (said,) if said else ()
        lacks = "its vocabulary: --tokenizer FOLDER names it" if encoder in self.held else "T5: --text-encoder FOLDER names it"
        return (f"T5 is left out, which reads the prompt best; {self.folder.name} comes without {lacks}",)

    @property
    def _beside(self) -> Path:
        assert self.beside is not None
        return self.beside

    @property
    def _is_t5_alone(self) -> bool:
        return (self._beside / "config.json").is_file()

    @property
    def _index_beside(self) -> Mapping[str, Any]:
        return read_json(self._beside / "model_index.json")


def _builder(library: str, name: str, config: Mapping[str, Any]) -> Any:
    """What makes the module of a part: the light one where there is one, else the library's."""
    if name in LIGHT:
        module, _, made = LIGHT[name].partition(":")
        light = importlib.import_module(module)
        ours = light.Config(**{n: tuple(v) if isinstance(v, list) else v for n, v in config.items() if not n.startswith("_")})
        return lambda: getattr(light, made)(ours)
    cls = getattr(importlib.import_module(library), name)
    if library == "diffusers":
        return lambda: cls.from_config(config)
    return lambda: cls(cls.config_class.from_dict(config))


def model_of(names: Mapping[str, Any]) -> str | None:
    """Which of `MODELS` has tensors of these names; None where it is none."""
    stems = {n.removeprefix(NETWORK).split(".")[0] + "." for n in names}
    return next((m for m, (block, _) in MODELS.items() if block in stems), None)


def read(file: Path, model: str, beside: Path | None, words_of: Path | None) -> FlowParts:
    """The parts of a single file, and of the folders that are given with it. Raises ModelError where something is missing,
    saying what to give, or where tensors belong to no part."""
    shapes = {n: shape for n, (_, shape) in weights.header(file, alone=True).items()}
    configs = json.loads((PUBLISHED / f"{model}.json").read_text(encoding="utf-8"))
    prefixes = {**MODELS[model][1], "transformer": NETWORK if any(n.startswith(NETWORK) for n in shapes) else ""}
    held: dict[str, dict[str, str]] = {}
    for name in shapes:
        part = next((p for p, prefix in prefixes.items() if name.startswith(prefix)), None)
        if part is None and not name.endswith(LEFT):
            raise ModelError(f"{file.name}: unexpected tensor {name!r:.100}")
        if part is not None and not name.endswith(LEFT):
            held.setdefault(part, {})[name.removeprefix(prefixes[part])] = name
    apart = beside if beside is not None and beside.is_file() else None
    if apart is not None:
        held[T5[model][0]] = _t5_of(apart)
        beside = None
    network = {stem: shapes[name] for stem, name in held["transformer"].items()}
    try:
        configs["transformer"] = flow_names.config(model, network, configs["transformer"])
    except ModelError as error:
        raise ModelError(f"{file.name} (transformer): {error}") from error
    if model == "flux" and not configs["transformer"]["guidance_embeds"]:
        configs["scheduler"] = configs["scheduler_of_schnell"]
    index = _complete(file, model, configs["index"], held, (beside, words_of))
    found = FlowParts(file, index, model=model, configs=configs, held=held, beside=beside)
    return replace(found, words_of=words_of, apart=apart)


def _t5_of(file: Path) -> dict[str, str]:
    """The names of the tensors of a T5's own file. Raises ModelError where it is another."""
    if file.suffix != ".safetensors":
        raise ModelError(f"{file.name} is no .safetensors file; other formats may hold code and are not read")
    names = weights.header(file, alone=True)
    float8.note(file.name, names)  # refuses what is scaled, before anything is read
    if "encoder.block.0.layer.0.SelfAttention.q.weight" not in names:
        first = next(iter(names), "nothing")
        raise ModelError(f"--text-encoder takes a folder or the file of a T5; {file.name} holds {first!r:.60}")
    return {name: name for name in names}


def _complete(
    file: Path, model: str, index: Mapping[str, Any], held: Mapping[str, Any], folders: tuple[Path | None, Path | None]
) -> Mapping[str, Any]:
    """The index of what there is. Raises ModelError that names what is missing and the flag for it."""
    (beside, words_of), (encoder, tokenizer) = folders, T5[model]
    for flag, folder in (("--text-encoder", beside), ("--tokenizer", words_of)):
        if folder is not None and not folder.is_dir():
            kind = "a folder" if flag == "--tokenizer" else "a folder or the file of a T5"
            raise ModelError(f"{flag} {str(folder)!r:.120} is not {kind}")
    alone = beside is not None and (beside / "config.json").is_file()
    there = {p for p in index if beside is not None and not alone and (beside / p).is_dir()} | ({encoder} if alone else set())
    lost = [p for p in index if not p.startswith("tokenizer") and p not in held and p not in there]
    if model == "sd3" and lost == [encoder]:
        return {n: v for n, v in index.items() if n not in (encoder, tokenizer)}
    if lost:
        wanted = "--text-encoder FOLDER names a model in diffusers' layout that has them"
        raise ModelError(f"{file.name} holds no {', '.join(lost)}; {wanted}")
    if words_of is None and tokenizer not in there:
        if model == "sd3" and encoder in held:
            return {n: v for n, v in index.items() if n not in (encoder, tokenizer)}
        raise ModelError(f"the vocabulary of T5 is not shipped: --tokenizer FOLDER names the folder {tokenizer} of {model}")
    return index
