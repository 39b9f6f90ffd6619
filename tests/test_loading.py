"""Model folders: what loads equals diffusers, what is broken is refused in one sentence that names the part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import VP, Flow, ModelError, Pipeline, load
from ldm_pipe.files import sha256
from ldm_pipe.level import CLEAN
from ldm_pipe.loading import path_of

Tiny = Callable[[str], Path]


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("eps"), tmp_path / "model"))


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_the_finished_latents_equal_diffusers(tiny: Tiny, prediction: str) -> None:
    """Same folder, start tensor, guidance and steps: StableDiffusionPipeline and ours, 1e-4 in fp32."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

    steps, scale, prompt = 5, 3.0, "a fox on a blue background"
    folder = tiny(prediction)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    theirs = StableDiffusionPipeline.from_pretrained(folder, scheduler=None, safety_checker=None, local_files_only=True)
    ours = Pipeline.from_pretrained(str(folder), "cpu", "fp32")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if prediction == "flow":
        expected = _flow_by_hand(theirs, start, prompt, steps, scale)
    else:
        kind = DDIMScheduler if prediction == "v" else EulerDiscreteScheduler
        config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        theirs.scheduler = kind.from_config(config)
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(prompt, num_inference_steps=steps, guidance_scale=scale, latents=start, output_type="latent",
                          height=32, width=32).images  # fmt: skip
    found = _from_start(ours, start, prompt, {"eps": "euler", "v": "ddim", "flow": "euler"}[prediction], steps, scale)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4


def _from_start(pipe: Pipeline, start: torch.Tensor, prompt: str, sampler: str, steps: int, scale: float) -> torch.Tensor:
    from ldm_pipe import CFG, Noise, build, guided, levels, sample

    walk = levels.trailing(pipe.bundle.model.path, steps)
    method = build("sampler", sampler)
    conds = {"cond": pipe.bundle.text([prompt]), "uncond": pipe.bundle.text([""])}
    denoise = guided(pipe.bundle.model.branches(**conds), CFG(scale))
    return sample(denoise, method.start(start, walk[0]), walk, method, Noise((0,), tuple(start.shape[1:])))


@torch.no_grad()
def _flow_by_hand(theirs: Any, start: torch.Tensor, prompt: str, steps: int, scale: float) -> torch.Tensor:
    """diffusers' StableDiffusionPipeline takes no flow Euler, so: its U-Net, its encoder, its scheduler, our loop."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    cond, uncond = theirs.encode_prompt(prompt, "cpu", 1, True)
    x = start
    for t in scheduler.timesteps:
        out = theirs.unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample
        u, c = out.chunk(2)
        x = scheduler.step(u + scale * (c - u), t, x).prev_sample
    return x


def test_the_codec_equals_diffusers(tiny: Tiny) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny("eps") / "vae")
    codec = load(tiny("eps")).codec
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        assert torch.allclose(codec.encode(images), latents * vae.config.scaling_factor, atol=1e-6)
        assert torch.allclose(codec.decode(codec.encode(images)), vae.decode(latents).sample, atol=1e-5)
    assert (codec.channels, codec.factor) == (4, 4)


def test_the_scheduler_gives_path_and_prediction() -> None:
    path, prediction = path_of({"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                                "beta_end": 0.012, "rescale_betas_zero_snr": True})  # fmt: skip
    assert isinstance(path, VP)
    assert path.level(999).alpha == 0
    assert prediction.name == "v"
    assert path_of({"prediction_type": "epsilon"})[0] == VP.linear()
    assert path_of({"_class_name": "FlowMatchEulerDiscreteScheduler"})[0] == Flow()
    for config in ({"prediction_type": "magic"}, {"beta_schedule": "magic"}):
        with pytest.raises(ModelError, match="'magic' is not one of"):
            path_of(config)


def _rewrite(folder: Path, part: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / part
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _retensor(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


UNET = "unet/diffusion_pytorch_model.safetensors"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "index is a list": (lambda f: (f / "model_index.json").write_text("[1]"), "holds list"),
    "index is not JSON": (lambda f: (f / "model_index.json").write_text("{"), "cannot be read as JSON"),
    "foreign class": (
        lambda f: _rewrite(f, "model_index.json", lambda c: c.update(unet=["evil", "Network"])), r"unet is \['evil'",
    ),
    "part outside": (lambda f: _rewrite(f, "model_index.json", lambda c: c.update(vae="../vae")), "vae is '../vae'"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "has no scheduler_config.json"),
    "missing tensor": (lambda f: _retensor(f / UNET, lambda t: t.pop("conv_in.weight")), "missing tensor 'conv_in.weight'"),
    "extra tensor": (lambda f: _retensor(f / UNET, lambda t: t.update(evil=torch.zeros(1))), "unexpected tensor 'evil'"),
    "wrong shape": (lambda f: _retensor(f / UNET, lambda t: t.update({"conv_in.bias": torch.zeros(3)})), "unet"),
    "truncated": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:999]), "damaged or no safetensors"),
    "pickle only": (lambda f: (f / UNET).rename(f / "unet/diffusion_pytorch_model.bin"), "only safetensors is read"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), "vae has no config.json"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer cannot be loaded"),
    "bad defaults": (lambda f: (f / "ldm_pipe.json").write_text('{"stepz": 3}'), "did you mean 'steps'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_refused_in_one_sentence(copy: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    damage(copy)
    with pytest.raises(ModelError, match=words) as caught:
        load(copy)
    assert len(str(caught.value)) <= 260
    assert "\n" not in str(caught.value)


def test_a_changed_weight_file_is_found_by_its_sum(copy: Path) -> None:
    file = copy / UNET
    (copy / "SHA256SUMS").write_text(f"{sha256(file)}  {UNET}\n")
    assert load(copy).digests == {UNET: sha256(file)}
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match="does not have the SHA-256"):
        load(copy)
    (copy / "SHA256SUMS").write_text(f"{sha256(file)}  ../{UNET}\n")
    with pytest.raises(ModelError, match="not a file of the folder"):
        load(copy)


def test_the_end_of_every_spacing_is_clean(tiny: Tiny) -> None:
    from ldm_pipe import build

    path = load(tiny("eps")).model.path
    for name in ("leading", "trailing", "linspace", "quadratic", "karras", "flow"):
        walk = build("spacing", name)(path, 7)
        assert walk[-1] == CLEAN
        assert 6 <= len(walk) <= 8  # times that meet in one (small squares, shifts beyond the table) are kept once
