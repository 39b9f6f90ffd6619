"""Tiny random controls of the real classes, and the finished latents under them next to those of diffusers' pipelines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from tiny_controlnets import adapter, controlnet, flux_controlnet, sana_controlnet, sd3_controlnet, union
from tiny_families import MADE, sdxl
from tiny_texts import eye, lively, siglip

from ldm_pipe import Noise, Pipeline
from ldm_pipe.doors.controls import Controls
from ldm_pipe.parts import quiet

PROMPT, NEGATIVE, STEPS, SEED, SCALE = "a red fox on blue", "low quality", 5, 7, 4.0
HEIGHT, WIDTH = 32, 64  # not square: sides that are swapped show
GREYS = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
PICTURE = Image.merge("RGB", (GREYS.rotate(90), GREYS, GREYS.rotate(180)))
MASK = Image.linear_gradient("L").rotate(90).resize((90, 50)).convert("RGB")  # white to the right, of another size
FACE = torch.sin(torch.arange(12.0))[None]
# The U-Net of the published XL in small: no attention in its first stage, two layers deep in the last one.
STAGES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 16), "transformer_layers_per_block": (1, 1, 2), "layers_per_block": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A control beside a model. model: makes diffusers' pipeline of it; pipeline: the class that runs it under the control;
    saved: writes the control into a folder and says what --control is given; beside: what the class is given of that folder;
    given: what the call is given; ready: is done to the pipeline first; fields: what --set control... is given; settings:
    of our run, in the place of the usual ones; pictures: that it reads."""

    model: Callable[[], Any]
    pipeline: str
    saved: Callable[[Path], str]
    beside: Callable[[Path], dict[str, Any]] = lambda folder: {}
    given: dict[str, Any] = field(default_factory=dict)
    ready: Callable[[Any, Path], None] = lambda pipe, folder: None
    fields: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    pictures: int = 1


def both(name: str, place: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(our latents, diffusers' latents) of one image under a control, from the same start."""
    case, folder, control = CASES[name], place / "model", place / "control"
    torch.manual_seed(0)
    with quiet():
        case.model().save_pretrained(folder)
        text = case.saved(control)
    pipe = Pipeline.from_pretrained(str(folder), "cpu", "fp32")
    flow = name.startswith(("sd3", "flux", "sana"))
    settings: dict[str, Any] = {"negative_prompt": NEGATIVE, "steps": STEPS, "guidance_scale": SCALE, "seed": SEED}
    settings |= {"height": HEIGHT, "width": WIDTH} | ({} if flow else {"sampler": "ddim", "spacing": "leading"}) | case.settings
    whole = pipe.plan(PROMPT, **settings)
    start = Noise((SEED,), whole.shape).start()
    whole = Controls.of([text], case.pictures, [0.6], case.fields).applied(pipe, whole, [PICTURE][: case.pictures])
    return next(pipe.run(whole)).latents, theirs(case, folder, control, start, flow)


def theirs(case: Case, folder: Path, control: Path, start: torch.Tensor, flow: bool) -> torch.Tensor:
    """The latents of diffusers' pipeline. It draws the latents of a picture, we take their mean; it is made to do that too."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Drawn

    mean = mock.patch.object(Drawn, "sample", lambda self, generator=None: self.mean)
    with quiet(), warnings.catch_warnings(), mean:
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, case.pipeline).from_pretrained(folder, local_files_only=True, **case.beside(control))
        pipe.set_progress_bar_config(disable=True)
        if not flow:
            leading = {"timestep_spacing": "leading", "set_alpha_to_one": True, "steps_offset": 1}
            pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **leading)
        case.ready(pipe, control)
        given = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
        given |= {"height": HEIGHT, "width": WIDTH, "latents": start, **case.given}
        if case.pipeline.startswith("Flux"):
            given["latents"] = pipe._pack_latents(start, *start.shape)
            out = pipe(**given, max_sequence_length=512).images
            return pipe._unpack_latents(out, HEIGHT, WIDTH, pipe.vae_scale_factor)
        return pipe(**given, negative_prompt=NEGATIVE).images


def written(make: Callable[[], Any], gain: float = 1.3) -> Callable[[Path], str]:
    """What saves the network that `make` makes, its weights as large as `gain` says."""

    def saved(folder: Path) -> str:
        lively(make(), gain).save_pretrained(folder)
        return str(folder)

    return saved


def read(part: str, name: str) -> Callable[[Path], dict[str, Any]]:
    """What reads it back by diffusers."""
    import diffusers

    return lambda folder: {part: getattr(diffusers, name).from_pretrained(folder)}


def low_ranks(number: int, channels: int, width: int) -> dict[str, torch.Tensor]:
    """What a file for faces adds to the two attentions of a layer, to the image and to tokens of `width`."""
    found = {}
    for k, source in ((2 * number, channels), (2 * number + 1, width)):
        for layer, inside in (("to_q", channels), ("to_k", source), ("to_v", source), ("to_out", channels)):
            name = f"ip_adapter.{k}.{layer}_lora"
            found |= {f"{name}.down.weight": torch.randn(3, inside) * 0.3, f"{name}.up.weight": torch.randn(channels, 3) * 0.3}
    return found


def image_prompt(form: str, width: int, layers: tuple[int, ...], masked: bool = False) -> Callable[[Path], str]:
    """What saves an IP-Adapter's file for tokens of `width` and attentions of these widths, and beside it a CLIP of 28 pixels,
    a face and a mask."""

    def saved(folder: Path) -> str:
        from safetensors.torch import save_file

        from ldm_pipe.networks.image_prompt import Base, Face, Plus

        eye().save_pretrained(folder / "image_encoder")
        forms = {"base": lambda: Base(12, width, 4), "face": lambda: Face(12, 24, width, 4)}
        made = lively(forms.get(form, lambda: Plus(16, width, (1, 5, 24), 4, 128, 96))())
        tensors = {f"image_proj.{n}": t.clone() for n, t in made.state_dict().items()}
        for k, channels in enumerate(layers):
            tensors |= {f"ip_adapter.{2 * k + 1}.to_{kind}_ip.weight": torch.randn(channels, width) * 0.3 for kind in "kv"}
            tensors |= low_ranks(k, channels, width) if form == "face" else {}
        save_file(tensors, folder / f"{form}.safetensors")
        save_file({"face": FACE}, folder / "one.safetensors")
        MASK.save(folder / "mask.png")
        eyes = f"image_encoder={folder / 'image_encoder'}" if form != "face" else f"face={folder / 'one.safetensors'}"
        return f"ip_adapter({folder / form}.safetensors, {eyes}{f', mask={folder}/mask.png' if masked else ''})"

    return saved


def flux_prompt(folder: Path) -> str:
    """Saves an IP-Adapter's file for `tiny_families.flux`, and a CLIP beside it."""
    from safetensors.torch import save_file

    from ldm_pipe.networks.image_prompt import Base

    eye().save_pretrained(folder / "image_encoder")
    tensors = {f"ip_adapter_proj_model.{n}": t.clone() for n, t in lively(Base(12, 32, 4)).state_dict().items()}
    for kind in "kv":
        name = f"double_blocks.0.processor.ip_adapter_double_stream_{kind}_proj"
        tensors |= {f"{name}.weight": torch.randn(32, 32) * 0.3, f"{name}.bias": torch.randn(32) * 0.3}
    save_file(tensors, folder / "flux.safetensors")
    return f"ip_adapter({folder / 'flux.safetensors'})"


def sd3_tensors() -> dict[str, torch.Tensor]:
    """The tensors of an IP-Adapter for `tiny_families.sd3`, whose first block has two attentions."""
    from ldm_pipe.networks.timed_prompt import Beside, Resampler

    resampler = lively(Resampler(16, 32, (1, 5, 24), 4, 128, 96, 8))
    tensors = {f"image_proj.{n}": t.clone() for n, t in resampler.state_dict().items()}
    for k in range(3):
        made = lively(Beside(32, 32, 24, 8))
        drawn = {n: torch.randn_like(t) * 0.3 if t.ndim == 1 else t.clone() for n, t in made.state_dict().items()}
        tensors |= {f"ip_adapter.{k}.{n}": t + (n.startswith("norm") and n.endswith("weight")) for n, t in drawn.items()}
    return tensors


def sd3_prompt(folder: Path) -> str:
    """Saves it, and a SigLIP beside it."""
    from safetensors.torch import save_file

    siglip().save_pretrained(folder / "image_encoder")
    size = '{"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}'
    (folder / "image_encoder" / "preprocessor_config.json").write_text(size)
    save_file(sd3_tensors(), folder / "sd3.safetensors")
    return f"ip_adapter({folder / 'sd3.safetensors'})"


def sd3_loaded(pipe: Any, folder: Path) -> None:
    """Gives diffusers' pipeline the same file."""
    eyes = {"image_encoder_folder": str(folder / "image_encoder")}
    pipe.load_ip_adapter(str(folder), weight_name="sd3.safetensors", subfolder="", local_files_only=True, **eyes)
    pipe.set_ip_adapter_scale(0.6)


def flux_loaded(pipe: Any, folder: Path) -> None:
    """Gives diffusers' pipeline the same file."""
    eyes = {"image_encoder_pretrained_model_name_or_path": str(folder / "image_encoder"), "image_encoder_subfolder": ""}
    pipe.load_ip_adapter(str(folder), weight_name="flux.safetensors", subfolder="", local_files_only=True, **eyes)
    pipe.set_ip_adapter_scale(0.6)


def loaded(form: str) -> Callable[[Any, Path], None]:
    """What gives diffusers' pipeline the same file."""

    def ready(pipe: Any, folder: Path) -> None:
        eyes = {"image_encoder_folder": None} if form == "face" else {}
        pipe.load_ip_adapter(str(folder), subfolder="", weight_name=f"{form}.safetensors", local_files_only=True, **eyes)
        pipe.set_ip_adapter_scale(0.6)

    return ready


def ip_adapter(family: Callable[[], Any], pipeline: str, form: str, width: int, layers: tuple[int, ...]) -> Case:
    """A case of an IP-Adapter."""
    prompt = {"ip_adapter_image": PICTURE}
    prompt = {"ip_adapter_image_embeds": [torch.stack([FACE * 0, FACE])]} if form == "face" else prompt
    return Case(family, pipeline, image_prompt(form, width, layers), given=prompt, ready=loaded(form), pictures=form != "face")


def masked(case: Case, saved: Callable[[Path], str]) -> Case:
    """The case with a mask, as diffusers' own processor makes it."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    mask = IPAdapterMaskProcessor().preprocess([MASK], height=HEIGHT, width=WIDTH)
    given = {**case.given, "cross_attention_kwargs": {"ip_adapter_masks": [mask.reshape(1, 1, HEIGHT, WIDTH)]}}
    return replace(case, saved=saved, given=given)


def flux_case(make: Callable[[], Any], mode: int | None) -> Case:
    """A case of Flux, whose pipeline wants the kind of picture from union networks."""
    given = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.6} | ({} if mode is None else {"control_mode": mode})
    named = ("FluxControlNetPipeline", written(make), read("controlnet", "FluxControlNetModel"))
    return Case(MADE["flux dev"], *named, given, fields={} if mode is None else {"mode": mode})


HINT = {"image": PICTURE, "controlnet_conditioning_scale": 0.6}
PLAIN = {"clean_caption": False, "use_resolution_binning": False}
SMALL, DEEP = (8, 8, 8, 16), (*(16,) * 6, *(16,) * 9, *(16,) * 2)


def sd3_case(**changes: Any) -> Case:
    """A case of Stable Diffusion 3."""
    given = {"control_image": PICTURE, "controlnet_conditioning_scale": 0.6}
    named = ("StableDiffusion3ControlNetPipeline", written(lambda: sd3_controlnet(**changes), 0.8))
    return Case(MADE["sd3"], *named, read("controlnet", "SD3ControlNetModel"), given)


CASES: dict[str, Case] = {
    "sd ip-adapter": ip_adapter(MADE["sd"], "StableDiffusionPipeline", "base", 16, SMALL),
    "sd ip-adapter plus": ip_adapter(MADE["sd"], "StableDiffusionPipeline", "plus", 16, SMALL),
    "sdxl ip-adapter": ip_adapter(lambda: sdxl(**STAGES), "StableDiffusionXLPipeline", "base", 40, DEEP),
    "sdxl ip-adapter plus": ip_adapter(lambda: sdxl(**STAGES), "StableDiffusionXLPipeline", "plus", 40, DEEP),
    "sd ip-adapter, masked": masked(
        ip_adapter(MADE["sd"], "StableDiffusionPipeline", "plus", 16, SMALL), image_prompt("plus", 16, SMALL, True)
    ),
    "sd ip-adapter face": ip_adapter(MADE["sd"], "StableDiffusionPipeline", "face", 16, SMALL),
    "sdxl ip-adapter face, masked": masked(
        ip_adapter(lambda: sdxl(**STAGES), "StableDiffusionXLPipeline", "face", 40, DEEP), image_prompt("face", 40, DEEP, True)
    ),
    "sdxl controlnet": Case(
        MADE["sdxl"], "StableDiffusionXLControlNetPipeline", written(controlnet), read("controlnet", "ControlNetModel"), HINT
    ),
    "sdxl controlnet, union": Case(
        MADE["sdxl"], "StableDiffusionXLControlNetUnionPipeline", written(union), read("controlnet", "ControlNetUnionModel"),
        {"control_image": PICTURE, "control_mode": 4, "controlnet_conditioning_scale": 0.6}, fields={"mode": "normal"},
    ),
    "sdxl t2i-adapter": Case(
        lambda: sdxl(**STAGES), "StableDiffusionXLAdapterPipeline", written(adapter), read("adapter", "T2IAdapter"),
        {"image": PICTURE, "adapter_conditioning_scale": 0.6},
    ),
    "sd3 controlnet": sd3_case(),
    "sd3 controlnet, pooled": sd3_case(force_zeros_for_pooled_projection=False),
    "sd3 ip-adapter": Case(
        MADE["sd3"], "StableDiffusion3Pipeline", sd3_prompt, given={"ip_adapter_image": PICTURE}, ready=sd3_loaded
    ),
    "sana controlnet": Case(
        MADE["sana"], "SanaControlNetPipeline", written(sana_controlnet, 0.5), read("controlnet", "SanaControlNetModel"),
        {"control_image": PICTURE, "controlnet_conditioning_scale": 0.6, "num_inference_steps": 3, **PLAIN},
        settings={"steps": 3},
    ),
    "flux ip-adapter": Case(
        MADE["flux dev"], "FluxPipeline", flux_prompt, ready=flux_loaded, settings={"guidance_scale": None, "guide": "cfg(3)"},
        given={"ip_adapter_image": PICTURE, "guidance_scale": 3.5, "true_cfg_scale": 3.0, "negative_prompt": NEGATIVE},
    ),
    "flux controlnet": flux_case(flux_controlnet, None),
    "flux controlnet, union": flux_case(lambda: flux_controlnet(num_mode=3), 2),
}  # fmt: skip
