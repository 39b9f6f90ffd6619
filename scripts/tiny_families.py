"""Tiny random checkpoints of every family, of the real classes, saved by diffusers' own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_texts import clip, eye, gemma, lively, t5

from ldm_pipe.parts import quiet

LABELS = {"7": "cock", "207": "golden retriever, dog"}
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def kl(**changes: Any) -> Any:
    """An autoencoder of factor 4."""
    from diffusers import AutoencoderKL

    size = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    kinds: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return lively(AutoencoderKL(**kinds, **(size | {"force_upcast": False} | changes)))


def taesd(**changes: Any) -> Any:
    """A tiny autoencoder of factor 4."""
    from diffusers import AutoencoderTiny

    size: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        size |= {f"{side}_block_out_channels": (8, 8, 8), f"num_{side}_blocks": (1, 1, 1)}
    return lively(AutoencoderTiny(**(size | changes)), 0.8)


def unet(**changes: Any) -> Any:
    """A U-Net of two resolutions."""
    from diffusers import UNet2DConditionModel

    size = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "cross_attention_dim": 16,
            "attention_head_dim": 2, "norm_num_groups": 4}  # fmt: skip
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return lively(UNet2DConditionModel(**(kinds | size | changes)))


def sd(**changes: Any) -> Any:
    """Stable Diffusion 1 and 2."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer, encoder = clip(False)
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(**VP, steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(kl(), encoder, tokenizer, unet(**changes), scheduler, **rest)


def sd_taesd() -> Any:
    """Stable Diffusion with a tiny autoencoder."""
    pipe = sd()
    pipe.register_modules(vae=taesd())
    return pipe


def unclip() -> Any:
    """Stable Diffusion 2 with pictures."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessorPil

    tokenizer, encoder = clip(False)
    network = unet(class_embed_type="projection", projection_class_embeddings_input_dim=24)
    normal = StableUnCLIPImageNormalizer(12)
    torch.nn.init.normal_(normal.mean)
    torch.nn.init.uniform_(normal.std, 0.5, 1.5)
    scheduler = DDIMScheduler(**VP, steps_offset=1, clip_sample=False)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pictures = (CLIPImageProcessorPil(size=28, crop_size=28), eye(), normal, noising)
    return StableUnCLIPImg2ImgPipeline(*pictures, tokenizer, encoder, network, scheduler, kl())


def sd_v() -> Any:
    """Stable Diffusion 2 with v-prediction."""
    pipe = sd()
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    return pipe


def sdxl(**changes: Any) -> Any:
    """Stable Diffusion XL."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    (words, one), (words_2, two) = clip(False), clip(True, hidden_size=24, projection_dim=20)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 68}
    network = unet(cross_attention_dim=40, use_linear_projection=True, **(added | changes))
    scheduler = DDIMScheduler(**VP, steps_offset=1, clip_sample=False)
    return StableDiffusionXLPipeline(kl(), one, two, words, words_2, network, scheduler, add_watermarker=False)


def refiner() -> Any:
    """The refiner of Stable Diffusion XL."""
    from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline

    words_2, two = clip(True, hidden_size=24, projection_dim=20)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}
    network = unet(cross_attention_dim=24, use_linear_projection=True, **added)
    scheduler = DDIMScheduler(**VP, steps_offset=1, clip_sample=False)
    return StableDiffusionXLImg2ImgPipeline(
        kl(), None, two, None, words_2, network, scheduler, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip


def sd3(with_t5: bool = True) -> Any:
    """Stable Diffusion 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    (words, one), (words_2, two) = clip(True), clip(True, hidden_size=12, projection_dim=10)
    words_3, three = t5() if with_t5 else (None, None)
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=22, out_channels=4, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    codec = kl(shift_factor=0.06, scaling_factor=1.5)
    return StableDiffusion3Pipeline(lively(network), shifted, codec, one, words, two, words_2, three, words_3)


def flux(embeds: bool = True) -> Any:
    """Flux."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    (words, one), (words_2, two) = clip(False), t5()
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=embeds,
    )  # fmt: skip
    shifts = {"use_dynamic_shifting": True, "shift": 3.0} if embeds else {"shift": 1.0}
    codec = kl(shift_factor=0.1, scaling_factor=0.4)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(**shifts), codec, one, words, two, words_2, lively(network))


def pixart(alpha: bool = False) -> Any:
    """PixArt-sigma, or -alpha with its sizes as conditions."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer, encoder = t5()
    network = PixArtTransformer2DModel(
        sample_size=128 if alpha else 8, num_layers=2, patch_size=2, attention_head_dim=24, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=72, out_channels=8, use_additional_conditions=alpha,
    )  # fmt: skip
    kind = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    return kind(tokenizer, encoder, kl(), lively(network, 1.0), DDIMScheduler(**VP, steps_offset=1, clip_sample=False))


def sana() -> Any:
    """Sana."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer, encoder = gemma()
    network = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
    )  # fmt: skip
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_block_types": ("ResBlock", "EfficientViTBlock"), f"{side}_block_out_channels": (8, 8),
                  f"{side}_qkv_multiscales": ((), (5,)), f"{side}_layers_per_block": (1, 1)}  # fmt: skip
    codec = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407, **sides,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return SanaPipeline(tokenizer, encoder, lively(codec), lively(network, 0.8), scheduler)


def dit() -> Any:
    """DiT, by class."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return DiTPipeline(lively(network), kl(), scheduler)


MADE: dict[str, Callable[[], Any]] = {
    "sd": sd, "sd tiny autoencoder": sd_taesd, "sd v-prediction": sd_v, "unclip": unclip,
    "sd lcm": lambda: sd(time_cond_proj_dim=12),
    "sd inpainting": lambda: sd(in_channels=9), "sd pix2pix": lambda: sd(in_channels=8), "sdxl": sdxl, "sdxl refiner": refiner,
    "sd3": sd3,
    "sd3 without T5": lambda: sd3(False), "flux dev": flux, "flux schnell": lambda: flux(False), "pixart sigma": pixart,
    "pixart alpha": lambda: pixart(True), "sana": sana, "dit": dit,
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Write the checkpoint of a family."""
    torch.manual_seed(0)
    with quiet():
        MADE[name]().save_pretrained(folder)
    if name == "dit":  # its pipeline forgets the names of the classes, which published folders have
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"id2label": LABELS}))
    return folder
