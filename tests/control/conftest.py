"""Stable Diffusion in small, random and in float32: our model and diffusers' pipeline of any class on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import CFG, Model, Noise, build, guided, levels, load, sample
from ldm_pipe.patch import Patch, Patched, Run

STEPS, SCALE = 4, 4.0


@pytest.fixture(scope="session")
def folder(tiny: Callable[[str], Path]) -> Path:
    return tiny("eps")


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return load(folder).model


@pytest.fixture(scope="session")
def embeds() -> Tensor:
    """Tokens of (prompt, no prompt), [2,1,8,16]."""
    return torch.randn(2, 1, 8, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def ours(model: Model, embeds: Tensor, noise: Tensor) -> Callable[..., Tensor]:
    """ours(*patches): latents of a walk of DDIM under guidance."""
    from ldm_pipe import Cond

    def run(*patches: Patch) -> Tensor:
        walk = levels.leading(model.path, STEPS)
        branches = model.branches(cond=Cond(embeds[0]), uncond=Cond(embeds[1]))
        denoise = Patched(model, patches, Run(tuple(walk)))(guided(branches, CFG(SCALE)))
        return sample(denoise, noise, walk, build("sampler", "ddim"), Noise((0,), (4, 8, 8)))

    return run


@pytest.fixture
def theirs(folder: Path, embeds: Tensor, noise: Tensor) -> Callable[..., Tensor]:
    """theirs("StableDiffusionControlNetPipeline", {"controlnet": ...}, image=...): the same of a pipeline of diffusers."""
    import diffusers

    def run(name: str, parts: dict[str, Any], **given: Any) -> Tensor:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = diffusers.DDIMScheduler(**table, steps_offset=1, clip_sample=False)
        rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        cls = getattr(diffusers, name)
        pipe = cls(unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **rest, **parts)
        pipe.set_progress_bar_config(disable=True)
        text = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        out = pipe(
            **text, **given, latents=noise, num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent",
            height=32, width=32,
        )  # fmt: skip
        return out.images

    return run


@pytest.fixture(scope="session")
def hints() -> list[Tensor]:
    """Two pictures [1,3,32,32] in 0..1."""
    return list(torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(5)))


def randomised(network: Any, seed: int) -> Any:
    """No weight at a neutral value: a zero convolution would hide everything."""
    torch.manual_seed(seed)
    for weight in network.parameters():
        nn.init.normal_(weight, 0.02, 0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def nets() -> list[Any]:
    """Two random ControlNets."""
    from diffusers import ControlNetModel

    config = {"cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    down, widths = ("CrossAttnDownBlock2D", "DownBlock2D"), {"conditioning_embedding_out_channels": (4, 4, 4)}
    return [
        randomised(ControlNetModel(block_out_channels=(8, 16), down_block_types=down, **widths, **config), seed)
        for seed in (3, 4)
    ]


@pytest.fixture(scope="session")
def adapters() -> list[Any]:
    """Two random adapters."""
    from diffusers import T2IAdapter

    return [randomised(T2IAdapter(3, [8, 16], 1, 4, "full_adapter"), seed) for seed in (6, 7)]
