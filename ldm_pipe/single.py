"""Single files in the layout of the first latent diffusion code: the networks of Stable Diffusion 1, 2 and XL in one.

Such a file says nothing of itself: which model it is follows from its names, and the configuration is the published one, in
`published/`. Names are those of CompVis' and Stability's code (Rombach et al. 2022, arXiv 2112.10752); those of the towers are
OpenAI's and OpenCLIP's.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe import tokens, weights
from ldm_pipe.errors import ModelError
from ldm_pipe.families import class_of
from ldm_pipe.parts import LIGHT, Parts

PUBLISHED = Path(__file__).resolve().parent / "published"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
# By what a file is known, and where its text towers lie.
MODELS: dict[str, dict[str, str]] = {
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
}
# What training left in a file and sampling does not use.
LEFT = re.compile(
    r"model_ema\..*|(sqrt_|log_)?(one_minus_)?alphas_cumprod(_prev)?|sqrt_recip(m1)?_?alphas_cumprod|sqrt_recipm1_alphas_cumprod"
    r"|betas|posterior_.*|log_one_minus_alphas_cumprod|sqrt_one_minus_alphas_cumprod|logvar|lvlb_weights|scale_factor"
    r"|denoiser\.sigmas|global_step|.*\.position_ids|.*\.logit_scale|.*\.attn_mask"
)


@dataclass(frozen=True, eq=False)
class FileParts(Parts):
    """The parts that lie in one file; `folder` is the file. model: its name in `published/`; held: its tensors, mapped."""

    model: str = "sd1"
    configs: Mapping[str, Any] = field(default_factory=dict)
    held: Mapping[str, Tensor] = field(default_factory=dict)

    def _read(self, part: str) -> Any:
        module, _, build = LIGHT[str(class_of(self.index, part)).split(".")[1]].partition(":")
        light, where = importlib.import_module(module), f"{self.folder.name} ({part})"
        config = light.Config(**{n: _tupled(v) for n, v in self.configs[part].items() if not n.startswith("_")})
        rows = list(self._converted(part, config))
        made = getattr(light, build)
        return weights.filled(where, lambda: made(config), {n: t for n, t, _ in rows}, {n: old for n, _, old in rows})

    def _converted(self, part: str, config: Any) -> Iterator[tuple[str, Tensor, str]]:
        """(new name, tensor, name in the file) of everything that belongs to a part."""
        prefix = {"unet": UNET, "vae": VAE, **MODELS[self.model]}[part]
        for old, tensor in self.held.items():
            name = old.removeprefix(prefix)
            if name == old or LEFT.fullmatch(old):
                continue
            if part == "unet":
                yield unet_name(name, config.layers_per_block), tensor, old
            elif part == "vae":
                new = vae_name(name, len(config.block_out_channels))
                yield new, tensor[:, :, 0, 0] if ".attentions." in new and tensor.ndim == 4 else tensor, old
            elif "transformer." in prefix:
                yield name.removeprefix("text_model."), tensor, old
            else:
                yield from ((n, t, old) for n, t in open_clip(name, tensor, config, part == "text_encoder_2"))

    def tokenizer(self, part: str, vocabulary: int) -> tokens.Tokenizer:
        """CLIP's own, which is shipped."""
        merges = gzip.decompress((PUBLISHED / "clip_merges.txt.gz").read_bytes()).decode("utf-8")
        return tokens.published(merges, self.configs["pad"][part])


def unet_name(name: str, layers: int) -> str:
    """The present name of a U-Net's tensor. Blocks were counted through: `layers` resnets and a change of size each."""
    for old, new in (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
                     ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
                     ("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")):  # fmt: skip
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    found = re.fullmatch(r"(input|middle|output)_blocks?\.(\d+)(?:\.(\d+))?\.(.+)", name)
    if not found:
        return name
    way, i, rest = found[1], int(found[2]), found[4]
    if way == "middle":
        rest = f"{found[3]}.{rest}" if found[3] else rest
        return f"mid_block.attentions.0.{rest}" if i == 1 else f"mid_block.resnets.{i // 2}.{_resnet(rest)}"
    block, layer = divmod(i - (way == "input"), layers + 1)
    stage = f"{'down' if way == 'input' else 'up'}_blocks.{block}"
    if rest.startswith("op."):
        return f"{stage}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv.") and found[3] != "0":
        return f"{stage}.upsamplers.0.{rest}"
    return f"{stage}.resnets.{layer}.{_resnet(rest)}" if found[3] == "0" else f"{stage}.attentions.{layer}.{rest}"


def _resnet(name: str) -> str:
    for old, new in (("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"),
                     ("out_layers.0", "norm2"), ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")):  # fmt: skip
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def vae_name(name: str, blocks: int) -> str:
    """The present name of an autoencoder's tensor. The decoder's blocks were counted from the image on."""
    name = re.sub(r"coder\.down\.(\d+)\.block\.", r"coder.down_blocks.\1.resnets.", name)
    name = re.sub(r"coder\.down\.(\d+)\.downsample\.", r"coder.down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"coder\.up\.(\d+)\.", lambda m: f"coder.up_blocks.{blocks - 1 - int(m[1])}.", name)
    name = re.sub(r"(up_blocks\.-?\d+)\.block\.", r"\1.resnets.", name)
    name = re.sub(r"(up_blocks\.-?\d+)\.upsample\.", r"\1.upsamplers.0.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    for old, new in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
        name = name.replace(f".mid.attn_1.{old}.", f".mid_block.attentions.0.{new}.")
    return name.replace(".norm_out.", ".conv_norm_out.").replace(".nin_shortcut.", ".conv_shortcut.")


def open_clip(name: str, tensor: Tensor, config: Any, projected: bool) -> Iterator[tuple[str, Tensor]]:
    """The present names and tensors of one of OpenCLIP's. Layers beyond the configuration's are those that the model skips."""
    tops = {"positional_embedding": "embeddings.position_embedding.weight", "token_embedding.weight":
            "embeddings.token_embedding.weight", "ln_final.weight": "final_layer_norm.weight",
            "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
    layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if name == "text_projection":
        if projected:
            yield "text_projection.weight", tensor.T
    elif not layer:
        yield tops.get(name, name), tensor
    elif int(layer[1]) < config.num_hidden_layers:
        place, rest = f"encoder.layers.{layer[1]}.", layer[2]
        for old, new in (("ln_", "layer_norm"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("attn.", "self_attn.")):
            rest = rest.replace(old, new)
        joint = re.fullmatch(r"self_attn\.in_proj_(weight|bias)", rest)
        if not joint:
            yield place + rest, tensor
        else:
            yield from zip((f"{place}self_attn.{x}_proj.{joint[1]}" for x in "qkv"), tensor.chunk(3), strict=True)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read(file: Path) -> FileParts:
    """The parts of a single file. Raises ModelError where it is none of the known, or holds tensors that belong to no part."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        raise ModelError(f"{file.name} is no .safetensors file; other formats may hold code and are not read")
    with weights.named(file):
        names = weights.header(file, alone=True)
        model = next(
            (m for m, towers in MODELS.items() if all(any(n.startswith(p) for n in names) for p in towers.values())), None
        )
        if model is None or not any(n.startswith(UNET) for n in names):
            first = next(iter(names), "nothing")
            raise ModelError(f"{file.name} is not a Stable Diffusion 1, 2 or XL file: it holds {first!r:.60}, ...")
        configs = json.loads((PUBLISHED / f"{model}.json").read_text(encoding="utf-8"))
        prefixes = (UNET, VAE, *MODELS[model].values())
        strange = sorted(n for n in names if not n.startswith(prefixes) and not LEFT.fullmatch(n))
        if strange:
            raise ModelError(f"{file.name}: unexpected tensor {strange[0]!r:.100} and {len(strange) - 1} more")
        with safe_open(file, framework="pt") as found:
            held = {n: found.get_tensor(n) for n in names if n.startswith(prefixes)}
    entry = held.get(f"{UNET}input_blocks.0.0.weight")
    if entry is not None and entry.ndim == 4:
        configs["unet"]["in_channels"] = entry.shape[1]  # 9 for inpainting, 8 for editing
    return FileParts(file, configs["index"], model=model, configs=configs, held=held)
