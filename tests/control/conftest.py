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

    def run(name: str, parts: dict[str, Any], ready: Callable[[Any], None] | None = None, **given: Any) -> Tensor:
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = diffusers.DDIMScheduler(**table, steps_offset=1, clip_sample=False)
        rest = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        rest |= {"image_encoder": None} if ready else {}
        cls = getattr(diffusers, name)
        pipe = cls(unet=unet, vae=vae, scheduler=scheduler, requires_safety_checker=False, **rest, **parts)
        pipe.set_progress_bar_config(disable=True)
        if ready:
            ready(pipe)
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


def prompt_tensors(form: str, seed: int, width: int = 16, layers: tuple[int, ...] = (8, 8, 8, 16)) -> dict[str, Tensor]:
    """The tensors of an IP-Adapter's file, random, for tokens of `width`, attentions of these widths and the tiny CLIP."""
    from ldm_pipe.networks import image_prompt

    torch.manual_seed(seed)
    made: nn.Module = {
        "base": lambda: image_prompt.Base(12, width, 4),
        "plus": lambda: image_prompt.Plus(16, width, (1, 5, 24), 4, 128, 96),
        "full": lambda: image_prompt.Full(16, 16, width),
    }[form]()
    tensors = {f"image_proj.{n}": torch.randn_like(t) * 0.3 for n, t in made.state_dict().items()}
    for i, channels in enumerate(layers):
        for kind in "kv":
            tensors[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(channels, width) * 0.5
    return tensors


@pytest.fixture(scope="session")
def clip_eye() -> Any:
    """A random CLIPVisionModelWithProjection: 28 pixels a side, states of 16 channels, vectors of 12."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return randomised(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=12)), 9
    )


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, clip_eye: Any) -> Path:
    """A folder as it is published: IP-Adapters base, plus and full, the image encoder beside them."""
    from safetensors.torch import save_file

    place = tmp_path_factory.mktemp("ip")
    for seed, form in enumerate(("base", "plus", "full")):
        save_file(prompt_tensors(form, seed), place / f"{form}.safetensors")
    clip_eye.save_pretrained(place / "image_encoder")
    return place
