"""A picture's CLIP vector beside the words: a U-Net gets an input for it, nothing at first, and all of it learns on.

Hierarchical Text-Conditional Image Generation with CLIP Latents, Ramesh et al. 2022, arXiv 2204.06125, section 2.1, in the form
of stable-diffusion-2-1-unclip: the vector under cosine noise of any level, which the network is told, and at a quarter of the
visits none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm_pipe import files, loading
from ldm_pipe.errors import UsageError
from ldm_pipe.families import FAMILIES, family_of
from ldm_pipe.parts import WEIGHTS, quiet, read_json, vision
from ldm_pipe.vision import MEAN, STD
from train import folder as model_folder
from train.data.cache import key_of
from train.data.dataset import Dataset
from train.data.precomputed import digest
from train.data.source import Fault
from train.eyes import image_half
from train.job import Job
from train.tasks.finetune import Finetune

if TYPE_CHECKING:
    from PIL.Image import Image

LOOKED_AT = 512  # pictures that the mean and the spread of vectors are taken of, at most
NEW = {
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
}
NOISING = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Unclip(Finetune):
    """Fine-tuning of a U-Net that is told each picture's own vector; the export is a model folder for `--image-prompt`.

    encoder: the folder of a CLIP, or of its image half and projection, where the model has none yet ("builtin": that of the
    built-in world). A model without the input is given it, and kept in the cache; up to rounding it draws what it drew.
    """

    encoder: str = ""

    @cached_property
    def source(self) -> Path:
        """The model's folder, or one with the input and the image encoder, made where it is not there yet."""
        frame, eye = self.frame, self._eye()
        if eye is None:
            return frame
        data = Dataset.open(self.settings, *model_folder.shape_of(frame), self.group)
        rows = range(0, len(data), -(-len(data) // LOOKED_AT))
        key = key_of(frame=digest(frame, ""), encoder=digest(eye, ""), pictures=[data.digests[i] for i in rows])
        folder = Path(self.settings.cache) / f"unclip-{key[:16]}"
        if not folder.exists():
            with files.new_folder(folder) as temp:
                widen(frame, temp, eye, (data.source.picture(data.rows[i].name) for i in rows))
        return folder

    def check(self, job: Job) -> list[Fault]:
        """Also whether the model and the encoder go together."""
        try:
            self._eye()
        except UsageError as error:
            return [*super().check(job), Fault("[task]", str(error))]
        return super().check(job)

    def _eye(self) -> Path | None:
        """The folder of the image encoder that the model is given, None where it has the input already."""
        family = family_of(read_json(self.frame / "model_index.json"), "model_index.json")
        if family == "unclip":
            return None
        config = read_json(self.frame / "unet" / "config.json") if family == "sd" else {}
        if family != "sd" or config.get("class_embed_type") or config.get("num_class_embeds"):
            given = FAMILIES[family].title + ", with classes" * (family == "sd")
            raise UsageError(f"unclip takes a U-Net with one CLIP and no classes, not {given}")
        eye = loading.BUILTIN / "clip" if self.encoder == "builtin" else Path(self.encoder)
        if not self.encoder or not (eye / "config.json").is_file():
            raise UsageError(f"encoder is {self.encoder!r:.120}; it takes the folder of a CLIP, or of its image half")
        if not self.settings.cache:
            raise UsageError("data.cache is empty; the widened model is kept there")
        return eye

    @cached_property
    def bundle(self) -> Any:
        """The model with the input, loaded."""
        return loading.load(self.source)


def widen(frame: Path, folder: Path, eye: Path, pictures: Iterable[Image]) -> None:
    """Copy a model whose U-Net then takes vectors of pictures, through a projection that begins as nothing.

    eye: the folder of a CLIP. pictures: whose vectors say by what all are whitened.
    """
    encoder, said = image_half(eye, "CLIPVisionModelWithProjection"), eye / "preprocessor_config.json"
    side, width = encoder.config.image_size, encoder.config.projection_dim

    def projected(config: dict[str, Any], state: dict[str, Tensor]) -> None:
        config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * width}
        out = len(state["time_embedding.linear_2.bias"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first = nn.Linear(2 * width, out)
        last = {"weight": torch.zeros(out, out), "bias": torch.zeros(out)}
        state |= {f"class_embedding.linear_1.{n}": t.detach() for n, t in first.named_parameters()}
        state |= {f"class_embedding.linear_2.{n}": t for n, t in last.items()}

    model_folder.rebuilt(frame, folder, "unet", projected)
    for part in ("safety_checker", *NEW):  # of the old model
        shutil.rmtree(folder / part, ignore_errors=True)
    with quiet():
        encoder.save_pretrained(folder / "image_encoder")
    mean, std = ((0.5,) * 3,) * 2 if eye == loading.BUILTIN / "clip" else (MEAN, STD)
    usual = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": mean,
        "image_std": std,
    }
    _write(folder / "feature_extractor" / said.name, {**usual, **(read_json(said) if said.is_file() else {})})
    tower = vision(folder / "image_encoder", folder / "feature_extractor")
    vectors = torch.cat([tower.embeds(tower.pixels([picture])) for picture in pictures])
    normal = {"mean": vectors.mean(0, keepdim=True), "std": _spread(vectors)}
    _write(folder / "image_normalizer" / "config.json", {"embedding_dim": width})
    save_file(normal, folder / "image_normalizer" / WEIGHTS["diffusers"], metadata={"format": "pt"})
    _write(folder / "image_noising_scheduler" / "scheduler_config.json", NOISING)
    index = {
        k: v
        for k, v in read_json(frame / "model_index.json").items()
        if k not in ("safety_checker", "requires_safety_checker", *NEW)
    }
    if not (folder / "ldm_pipe.json").exists():
        _write(folder / "ldm_pipe.json", {"guidance_scale": FAMILIES["sd"].defaults.guidance_scale})  # as it was run with
    _write(folder / "model_index.json", {**index, "_class_name": "StableUnCLIPImg2ImgPipeline", **NEW})
    model_folder.write_sums(folder)


def _spread(vectors: Tensor) -> Tensor:
    """[1,D]: the standard deviation of each number, a hundredth of the mean one at least; ones of a single vector."""
    if len(vectors) < 2:
        return torch.ones(1, vectors.shape[1])
    found = vectors.std(0, keepdim=True)
    return found.clamp_min(float(found.mean()) / 100 or 1.0)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
