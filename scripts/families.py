"""The finished latents of every family next to those of diffusers' own pipeline: docs/results/families.{md,json}.

    python scripts/families.py [--only "sdxl controlnet" "sd ip-adapter"]

Every checkpoint is tiny and random, of the family's real classes, saved by diffusers and loaded by both sides.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import tiny_controls
import torch
from PIL import Image
from tiny_families import MADE, save

from ldm_pipe import Noise, Pipeline, files
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.parts import quiet

PROMPT, NEGATIVE, STEPS, SEED = "a red fox on blue", "low quality", 5, 7
LEVEL = 300  # of the noise on a picture's vector
HEIGHT, WIDTH = 32, 64  # not square: sides that are swapped show
FLOWS = ("sd3", "flux", "sana")
# What both sides are set to, beside prompts, steps, size and start.
SCALES = {"flux dev": 3.5, "flux schnell": 1.0, "sd lcm": 8.5}
KINDS = {"sd inpainting": "StableDiffusionInpaintPipeline", "sd pix2pix": "StableDiffusionInstructPix2PixPipeline"}
GREYS = Image.linear_gradient("L").resize((WIDTH, HEIGHT))
PICTURE = Image.merge("RGB", (GREYS, GREYS.rotate(90), GREYS.rotate(180)))
PICTURES = {"sd inpainting": {"init_image": PICTURE, "mask": GREYS.rotate(90)}, "sd pix2pix": {"init_image": PICTURE}}
NAMES = (*MADE, *tiny_controls.CASES)
SCHEDULERS = {"euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler", "lcm": "LCMScheduler"}


def samplers(name: str) -> tuple[str, ...]:
    """The samplers that a family is compared under. (diffusers' DiTPipeline steps from its scaled input, its unCLIP from an
    unscaled start, which only DDIM, whose scale is 1, survives.)"""
    if name.startswith(FLOWS):
        return ("euler",)
    if name == "sd lcm":
        return ("euler", "ddim", "lcm")
    return ("ddim",) if name in ("dit", "sdxl refiner", "unclip") else ("euler", "ddim")


def both(name: str, folder: Path, sampler: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(our latents, diffusers' latents) of one image from the same start."""
    pipe = Pipeline.from_pretrained(str(folder), "cpu", "fp32")
    prompt, negative = ("dog", "") if name == "dit" else (PROMPT, NEGATIVE)
    settings = {"negative_prompt": negative, "steps": STEPS, "guidance_scale": SCALES.get(name, 4.0), "seed": SEED}
    settings |= {"height": HEIGHT, "width": 32 if name == "dit" else WIDTH, "sampler": sampler}
    if not name.startswith(FLOWS):
        settings["spacing"] = {"euler": "trailing", "lcm": "lcm"}.get(sampler, "leading")
    pictures = PICTURES.get(name, {})
    plan = pipe.plan(prompt, **pictures, **settings)
    start = Noise((SEED,), plan.shape).start()
    if name == "unclip":
        plan = ImagePrompt(LEVEL).applied(pipe, plan, PICTURE)
    if name == "sdxl refiner":  # which takes over where the base stops
        plan = replace(plan, levels=plan.levels[2:], start=start)
    found = next(pipe.run(plan)).latents
    if name == "sd tiny autoencoder":  # whose pictures are compared
        found = (pipe.decode(found) / 2 + 0.5).clamp(0, 1)
    return found, theirs(name, folder, sampler, start, settings | {"prompt": prompt, **pictures})


def theirs(name: str, folder: Path, sampler: str, start: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The latents of diffusers' pipeline of the folder."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty = {n: None for n in ("text_encoder_3", "tokenizer_3") if name == "sd3 without T5"}
        kind = "LatentConsistencyModelPipeline" if sampler == "lcm" else KINDS.get(name, index["_class_name"])
        pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, **empty)
        pipe.set_progress_bar_config(disable=True)
        if not name.startswith(FLOWS):
            spaced = {"timestep_spacing": settings["spacing"], "set_alpha_to_one": True, "steps_offset": 1}
            pipe.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipe.scheduler.config, **spaced)
        given = {"num_inference_steps": STEPS, "guidance_scale": settings["guidance_scale"]}
        if name == "dit":
            return by_class(pipe, start, given)
        if sampler == "lcm":  # which draws noise at every step: it is given ours
            drawn = (Noise((SEED,), tuple(start.shape[1:])).at(i)("step") for i in itertools.count())
            given |= {"height": HEIGHT, "width": WIDTH, "output_type": "latent", "latents": start, "prompt": settings["prompt"]}
            with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", side_effect=drawn):
                return pipe(**given).images
        if name == "unclip":  # the noise on the picture's vector is ours
            given |= {"image": PICTURE, "noise_level": LEVEL}
            noise = Noise((SEED,), (12,)).at(0)("picture")
            pipe.noise_image_embeddings = functools.partial(pipe.noise_image_embeddings, noise=noise)
        given |= {"height": HEIGHT, "width": WIDTH, "output_type": "latent", "latents": start, "prompt": settings["prompt"]}
        if name.startswith("flux"):
            packed = pipe._pack_latents(start, *start.shape)
            out = pipe(**given | {"latents": packed, "max_sequence_length": 512}).images
            return pipe._unpack_latents(out, HEIGHT, WIDTH, pipe.vae_scale_factor)
        if name == "sd tiny autoencoder":
            given["output_type"] = "pt"
        if "init_image" in settings:
            given |= {"image": settings["init_image"]}
        if name == "sdxl refiner":
            given |= {"image": start, "denoising_start": 0.4}
        if name in ("sd pix2pix", "sdxl refiner"):
            given = {k: v for k, v in given.items() if k not in ("height", "width")}
        if name == "sd inpainting":  # diffusers draws these latents, we take their mean; so it is made to do that too
            encode = mock.patch(f"{type(pipe).__module__}.retrieve_latents", lambda out, **_: out.latent_dist.mean)
            with encode:
                return pipe(**given, mask_image=settings["mask"], negative_prompt=settings["negative_prompt"]).images
        if name.startswith(("pixart", "sana")):
            given |= {"clean_caption": False, "use_resolution_binning": False}
        return pipe(**given, negative_prompt=settings["negative_prompt"]).images


def by_class(pipe: Any, start: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
    """DiT's pipeline takes no start and gives no latents: both are caught at its edges."""
    caught = []

    def decode(latents: torch.Tensor) -> Any:
        caught.append(latents * pipe.vae.config.scaling_factor)
        return mock.Mock(sample=torch.zeros(1, 3, 4, 4))

    module = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    with mock.patch(module, return_value=start), mock.patch.object(pipe.vae, "decode", decode):
        pipe([207], **given)
    return caught[0]


def compared(name: str, place: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(sampler, our latents, diffusers' latents) of a family, or of a control beside one."""
    if name in tiny_controls.CASES:
        flow = name.startswith(FLOWS)
        yield "euler" if flow else "ddim", *tiny_controls.both(name, place)
        return
    folder = save(name, place / "model")
    for sampler in samplers(name):
        yield sampler, *both(name, folder, sampler)


def main() -> int:
    """Compare all or some, write the table; the rows of the others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"some of {', '.join(NAMES)}")
    wanted = parser.parse_args().only or NAMES
    results = Path(__file__).resolve().parents[1] / "docs" / "results"
    old = json.loads((results / "families.json").read_text()) if len(wanted) < len(NAMES) else []
    rows = [row for row in old if row["family"] not in wanted]
    for name in wanted:
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            for sampler, found, expected in compared(name, Path(place)):
                worst = float((found - expected).abs().max() / expected.abs().max())
                rows.append({"family": name, "sampler": sampler, "largest_difference": worst})
                print(f"{name:25} {sampler:6} {worst:.1e}  {time.perf_counter() - began:.1f} s")
    rows.sort(key=lambda row: NAMES.index(row["family"]))
    table = [f"| {r['family']} | {r['sampler']} | {r['largest_difference']:.1e} |" for r in rows]
    text = [
        "# Families against diffusers", "",
        "Largest difference of the finished latents, relative to their largest value, fp32 on a CPU. Tiny random checkpoints "
        f"of the real classes, {STEPS} steps (Sana's ControlNet: 3), guidance and negative prompt included. Made by "
        "`scripts/families.py`.", "",
        "| checkpoint | sampler | difference |", "|---|---|---|", *table, "",
    ]  # fmt: skip
    files.write(results / "families.md", "\n".join(text).encode(), replace=True)
    files.write(results / "families.json", (json.dumps(rows, indent=1) + "\n").encode(), replace=True)
    return 0 if all(r["largest_difference"] < 1e-4 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
