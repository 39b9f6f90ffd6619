"""The shipped model: whole, small enough, read by diffusers, and right under every sampler, spacing and rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm_pipe import CFG, FLOW, Between, Flow, Level, Model, Noise, Pipeline, Rescale, build, guided, registry, sample
from ldm_pipe.loading import BUILTIN, SUMS
from train.world import draw_scene, render
from train.world.grader import read
from train.world.scenes import Scene, captions

PROMPT = "a fox on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


def scenes(kind: str, count: int, seed: int = 404) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng, kind) for _ in range(count)]


def draw(pipe: Pipeline, wanted: list[Scene], **settings: object) -> list[np.ndarray]:
    out = pipe([captions(s)[0] for s in wanted], seeds=tuple(range(len(wanted))), **settings)
    return [np.asarray(i) for i in out.images]


def near(pipe: Pipeline, wanted: list[Scene], **settings: object) -> float:
    """Share of images whose background is the one that was asked for and on which something stands.

    A broken sampler gives noise or nothing; what the objects are is measured, with intervals, by scripts/evaluate.py.
    """
    readings = [read(i) for i in draw(pipe, wanted, **settings)]
    return float(np.mean([r.colour == s.colour and len(r.found) > 0 for r, s in zip(readings, wanted, strict=True)]))


def test_it_ships_whole_and_small() -> None:
    files = [f for f in BUILTIN.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 64_000_000
    listed = {line.split("  ")[1] for line in (BUILTIN / SUMS).read_text().splitlines()}
    assert listed == {f.relative_to(BUILTIN).as_posix() for f in files} - {SUMS}
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt", ""}


def test_its_digests_are_checked_and_kept(pipe: Pipeline) -> None:
    assert "unet/diffusion_pytorch_model.safetensors" in pipe.bundle.digests


@pytest.mark.parametrize("sampler", sorted(registry.KINDS["sampler"]))
def test_every_sampler_draws_on_the_ground_that_is_asked(pipe: Pipeline, sampler: str) -> None:
    steps = 20 if build("sampler", sampler).calls else 3  # an adaptive one takes the evaluations that it needs
    assert near(pipe, scenes("one", 6), sampler=sampler, steps=steps) == 1


@pytest.mark.parametrize("spacing", sorted(registry.KINDS["spacing"]))
def test_every_spacing_draws_on_the_ground_that_is_asked(pipe: Pipeline, spacing: str) -> None:
    options = {name: {"sigma_min": 0.02, "sigma_max": 50.0} for name in ("karras", "exponential", "lambda")}
    options |= {"file": {"values": tuple(k / 20 for k in range(20, 0, -1)), "unit": "u"}}
    assert near(pipe, scenes("one", 8), spacing=spacing, spacing_set=options.get(spacing, {}), steps=20) >= 0.8


@pytest.mark.parametrize("guide", ["cfg(2)", "cfg(3) | rescale(0.5)", "cfg(4) | between(0.1, 0.95)"])
def test_every_rule_draws_on_the_ground_that_is_asked(pipe: Pipeline, guide: str) -> None:
    assert near(pipe, scenes("one", 8), guide=guide, steps=20) >= 0.8


def test_guidance_matters(pipe: Pipeline) -> None:
    """At scale 0 the prompt is not heard."""
    wanted = scenes("one", 12)
    assert near(pipe, wanted, guidance_scale=3.0) > near(pipe, wanted, guidance_scale=0.0) + 0.5


def test_the_codec_is_sharp(pipe: Pipeline) -> None:
    images = np.stack([render(s) for kind in ("one", "two", "count") for s in scenes(kind, 16)])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = pipe.decode(pipe.bundle.codec.encode(x)).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))
    assert psnr.mean() > 29.5
    assert pipe.bundle.codec.encode(x).std().item() == pytest.approx(1, abs=0.1)


def test_diffusers_draws_the_same_picture(pipe: Pipeline) -> None:
    """The folder as it ships in StableDiffusionPipeline with its own scheduler; ours along the same levels, the network told
    the time in whole numbers, as that scheduler cuts it (which alone changes the latents by 2e-3)."""
    from diffusers import StableDiffusionPipeline

    class Cut(Flow):
        def time(self, level: Level) -> float:
            return float(int(super().time(level)))

    theirs = StableDiffusionPipeline.from_pretrained(BUILTIN, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = Noise((7,), (pipe.bundle.codec.channels, 16, 16))
    start = noise.start()
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0, "latents": start, "output_type": "latent"}
    expected = theirs(PROMPT, height=64, width=64, **settings).images
    walk = [Level(1 - float(s), float(s)) for s in theirs.scheduler.sigmas]
    model = Model(pipe.bundle.model.network, Cut(), FLOW)
    branches = model.branches(cond=pipe.bundle.text([PROMPT]), uncond=pipe.bundle.text([""]))
    found = sample(guided(branches, CFG(3.0)), start, walk, build("sampler", "dpm2m"), noise)
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4


def test_rules_nest_around_the_trained_model(pipe: Pipeline) -> None:
    out = pipe(PROMPT, rule=Between(0.2, 0.9, Rescale(0.5, CFG(4))), seed=1, steps=20)
    assert 0 < out.evaluations["uncond"] < out.evaluations["cond"] == 20


def test_words_it_cannot_know_are_named(pipe: Pipeline) -> None:
    assert pipe.bundle.text.notices(PROMPT) == []
    (notice,) = pipe.bundle.text.notices("a parrot on a blue sofa")
    assert "'parrot', 'sofa'" in notice
    assert "--model" in notice
    (notice,) = pipe.bundle.text.notices(" ".join(["fox"] * 40))
    assert "18 token(s) longer than the 24" in notice
