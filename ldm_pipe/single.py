"""Single files in the layout of the first latent diffusion code: the networks of Stable Diffusion 1, 2 and XL in one.

Such a file says nothing of itself: which model it is follows from its names (`first_names`), and the configuration is the
published one, in `published/`.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_pipe import single_others, tokens, weights
from ldm_pipe.errors import ModelError
from ldm_pipe.families import class_of
from ldm_pipe.first_names import open_clip, unet_name, vae_name
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
    """The parts that lie in one file; `folder` is the file. model: its name in `published/`; held: the names of its tensors."""

    model: str = "sd1"
    configs: Mapping[str, Any] = field(default_factory=dict)
    held: tuple[str, ...] = ()

    def _read(self, part: str) -> Any:
        from safetensors import safe_open

        module, _, build = LIGHT[str(class_of(self.index, part)).split(".")[1]].partition(":")
        light, where = importlib.import_module(module), f"{self.folder.name} ({part})"
        config = light.Config(**{n: _tupled(v) for n, v in self.configs[part].items() if not n.startswith("_")})
        how, made = self.how_of(part), getattr(light, build)
        with safe_open(self.folder, framework="pt") as found:
            rows = list(self._converted(part, config, weights.tensors_as(self.folder, found, how.dtype)))
        called = {n: old for n, _, old in rows}
        return weights.filled(where, lambda: made(config), {n: t for n, t, _ in rows}, called, how)

    def _converted(self, part: str, config: Any, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor, str]]:
        """(new name, tensor, name in the file) of everything that belongs to a part."""
        prefix = {"unet": UNET, "vae": VAE, **MODELS[self.model]}[part]
        for old in self.held:
            name = old.removeprefix(prefix)
            if name == old or LEFT.fullmatch(old):
                continue
            tensor = read(old)
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
            first, other = next(iter(names), "nothing"), single_others.known(names)
            none = f"is not a Stable Diffusion 1, 2 or XL file: it holds {first!r:.60}, ..."
            raise ModelError(f"{file.name} {other or none}")
        configs = json.loads((PUBLISHED / f"{model}.json").read_text(encoding="utf-8"))
        prefixes = (UNET, VAE, *MODELS[model].values())
        strange = sorted(n for n in names if not n.startswith(prefixes) and not LEFT.fullmatch(n))
        if strange:
            raise ModelError(f"{file.name}: unexpected tensor {strange[0]!r:.100} and {len(strange) - 1} more")
        with safe_open(file, framework="pt"):
            pass  # what it declares is whole
    _, entry = names.get(f"{UNET}input_blocks.0.0.weight", ("", ()))
    if len(entry) == 4:
        configs["unet"]["in_channels"] = entry[1]  # 9 for inpainting, 8 for editing
    held = tuple(n for n in names if n.startswith(prefixes))
    return FileParts(file, configs["index"], model=model, configs=configs, held=held)
