"""A tiny latent diffusion model with random weights, in diffusers' folder layout, made once per test run."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # the test machine is small, and two threads only wait for each other on tensors this size

SCHEDULERS: dict[str, dict[str, Any]] = {
    "eps": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000},
    "v": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "beta_schedule": "scaled_linear",
          "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "rescale_betas_zero_snr": True},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
}  # fmt: skip


def make_tiny(folder: Path, prediction: str = "eps") -> Path:
    """Write a whole tiny model: 32x32 pixels, latents 4x8x8, prompts of 8 tokens."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from train.tasks.latent import write_index
    from train.world.words import make_tokenizer, save_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer(8)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends["pad_token_id"] = tokenizer.pad_token_id
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **size, **ends)
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    save_tokenizer(tokenizer, folder / "tokenizer")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, force_upcast=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    ).save_pretrained(folder / "unet")  # fmt: skip
    write_index(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULERS[prediction]))
    settings = {"size": [32, 32], "steps": 4, "guidance_scale": 3.0, "sampler": "ddim", "spacing": "leading"}
    (folder / "ldm_pipe.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny("eps" | "v" | "flow"): the folder of a tiny model of that prediction. Do not change it; copy it."""
    made: dict[str, Path] = {}

    def folder(prediction: str = "eps") -> Path:
        if prediction not in made:
            made[prediction] = make_tiny(tmp_path_factory.mktemp(f"tiny-{prediction}"), prediction)
        return made[prediction]

    return folder


@pytest.fixture(scope="session")
def diffusers_model() -> Callable[[str], Any]:
    """diffusers_model("unet" | "pixart" | "uncond"): a tiny network of diffusers' own with random weights, as a Model.

    Images 4x8x8; tokens [B,6,16] for the first two. PixArt also minds the mask of its tokens.
    """
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel

    from ldm_pipe import EPS, VP, Cond, Model

    class Net(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, kind: str) -> None:
            super().__init__()
            self.inner, self.kind = inner, kind

        def forward(self, x: torch.Tensor, time: torch.Tensor, cond: Cond) -> torch.Tensor:
            if self.kind == "uncond":
                return self.inner(x, time, return_dict=False)[0]
            more: dict[str, Any] = {}
            if self.kind == "pixart":
                more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": cond.mask}
            tokens = cond.tokens
            return self.inner(x, encoder_hidden_states=tokens, timestep=time, return_dict=False, **more)[0]

    def make(kind: str) -> Any:
        torch.manual_seed(0)
        if kind == "pixart":
            net: Any = PixArtTransformer2DModel(
                num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
                cross_attention_dim=16, caption_channels=16, norm_num_groups=4, use_additional_conditions=False,
            )  # fmt: skip
        elif kind == "unet":
            net = UNet2DConditionModel(
                sample_size=8, layers_per_block=1, block_out_channels=(8, 16), cross_attention_dim=16, attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4,
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )  # fmt: skip
        else:
            net = UNet2DModel(
                sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
                attention_head_dim=4,
            )  # fmt: skip
        return Model(Net(net.eval(), kind), VP.linear(), EPS)

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """saved(name): the folder of a tiny model of a family, by its name in scripts/tiny_families.py. Do not change it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
                tiny_families = importlib.import_module("tiny_families")
            made[name] = tiny_families.save(name, tmp_path_factory.mktemp("tiny") / "model")
        return made[name]

    return folder
