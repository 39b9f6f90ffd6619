"""From scratch: fresh networks begin at zero, train, resume to the bit, and come out as folders that load and draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline, adapted
from ldm_pipe.errors import UsageError
from ldm_pipe.loading import load
from ldm_pipe.noise import Noise
from train.adapter_files import DIFFUSERS, KOHYA
from train.job import Job
from train.loop import run
from train.tasks.finetune import Finetune
from train.tasks.lora import Lora
from train.tasks.scratch import Scratch

UNET = {"kind": "unet", "channels": [8, 16], "attention": [False, True], "layers": [1, 1], "heads": 2, "side": 32}
DIT = {"kind": "dit", "channels": [16], "layers": [2], "heads": 2, "side": 32}
TEXT_DIT = {**DIT, "kind": "text_dit"}


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Scratch]:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("fox" if i % 2 else "owl")

    def task(network: dict[str, Any], **fields: Any) -> Scratch:
        data = {"path": str(photos), "cache": str(tmp_path / "cache"), "buckets": False, **fields.pop("data", {})}
        return Scratch(data, str(tiny("eps")), network=network, **fields)

    return task


def job(folder: Path, **changes: Any) -> Job:
    return replace(Job(str(folder), 4, batch=2, lr=1e-2, warmup=1, ema=0.5, log_every=1, save_every=2), **changes)


@pytest.mark.parametrize(
    ("network", "path", "prediction"),
    [
        (UNET, "Flow", "flow"),
        ({**UNET, "schedule": "scaled_linear", "prediction": "v", "zero_terminal": True}, "VP", "v"),
        ({**DIT, "schedule": "linear", "prediction": "eps"}, "VP", "eps"),
        (TEXT_DIT, "Flow", "flow"),
        ({**TEXT_DIT, "schedule": "scaled_linear", "prediction": "v", "zero_terminal": True}, "VP", "v"),
        ({**TEXT_DIT, "schedule": "linear", "prediction": "eps"}, "VP", "eps"),
        ({**TEXT_DIT, "schedule": "cosine", "prediction": "x0"}, "VP", "x0"),
    ],
)
def test_a_fresh_network_starts_at_zero_trains_and_draws(
    make: Any, tmp_path: Path, network: dict[str, Any], path: str, prediction: str
) -> None:
    task = make(network).grouped(2)
    assert (type(task.bundle.model.path).__name__, task.bundle.model.prediction.name) == (path, prediction)
    net, batch = task.net(), task.batch(0, range(2))
    level = task.plan.levels(batch["normal"], task.bundle.model.path)
    out = task.bundle.model.raw(batch["x0"], level, net._cond(batch))[1]
    assert (out == 0).all()
    straight = run(make(network), job(tmp_path / "a"))
    for stop in (1, 0):
        again = run(make(network), job(tmp_path / "b", stop=stop))
    part = "unet" if network["kind"] == "unet" else "transformer"
    name = f"{part}/diffusion_pytorch_model.safetensors"
    assert (straight / name).read_bytes() == (again / name).read_bytes()
    picture = Pipeline(load(straight))("fox", seed=1, steps=2).images[0]
    assert picture.size == (32, 32)


def test_adaln_zero_makes_every_block_the_identity(make: Any) -> None:
    dit = make({**DIT, "schedule": "linear", "prediction": "eps"}).bundle.model.network.transformer
    x, time, label = torch.randn(2, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([0, 1])
    for block in dit.transformer_blocks:
        assert torch.equal(block(x, timestep=time, class_labels=label), x)


def test_a_text_dit_begins_as_the_identity_whatever_the_text(make: Any) -> None:
    dit = make(TEXT_DIT).bundle.model.network.transformer
    x, time, tokens = torch.randn(2, 16, 16), torch.randn(2, 6 * 16), torch.randn(2, 8, 16)
    with torch.no_grad():
        assert (dit.adaln_single(torch.tensor([3.0, 500.0]), batch_size=2, hidden_dtype=torch.float32)[0] == 0).all()
        for block in dit.transformer_blocks:
            assert torch.equal(block(x, encoder_hidden_states=tokens, timestep=0 * time), x)
            block.attn2.to_out[0].weight.fill_(1.0)
            assert not torch.equal(block(x, encoder_hidden_states=tokens, timestep=0 * time), x)  # nothing else holds it


def test_a_text_dit_learns_captions_in_every_shape(make: Any, tmp_path: Path) -> None:
    """Buckets, a text encoder that learns along, another size; what comes out is another model of the same kind."""
    task = make(TEXT_DIT, train_text=True, data={"buckets": True, "shuffle": True})
    folder = run(task, job(tmp_path / "run", steps=12, lr=3e-2))
    pipe = Pipeline(load(folder))
    one, two = (pipe(text, seed=1, steps=2, guidance_scale=1.0).latents for text in ("fox", "owl"))
    assert (one - two).abs().max() > 1e-3
    assert pipe.bundle.multiple == 8  # two latents of 4 pixels each
    wide = pipe("fox", seed=1, steps=2, width=48, height=24)
    assert wide.images[0].size == (48, 24)
    assert torch.isfinite(wide.latents).all()
    old, new = (load(f).text(["fox"]).tokens for f in (task.source, folder))
    assert not torch.equal(old, new)
    again = Finetune(task.data, str(folder))
    assert torch.isfinite(again.grouped(2).net()(again.grouped(2).batch(0, range(2)))["loss"])


def test_branches_beside_a_text_dit_are_read_back(make: Any, tmp_path: Path) -> None:
    folder = run(make(TEXT_DIT), job(tmp_path / "run"))
    task = Lora(make(TEXT_DIT).data, str(folder), train_text=True, lora={"rank": 2}).grouped(2)
    net, plain = task.net(), Pipeline.from_pretrained(str(folder), "cpu", "fp32", "sdpa")
    for p in net.parameters():
        p.data.normal_(0, 0.3)
    task.export(net, tmp_path)
    drawn = [p("fox", seed=1, steps=1).latents for p in (Pipeline(task.bundle), plain)]
    assert not torch.allclose(*drawn, atol=1e-3)
    for file in (KOHYA, DIFFUSERS):
        assert torch.allclose(adapted(plain, [str(tmp_path / file)])("fox", seed=1, steps=1).latents, drawn[0], atol=1e-4)


@pytest.mark.parametrize("network", [TEXT_DIT, {**TEXT_DIT, "schedule": "scaled_linear", "prediction": "eps"}, UNET])
def test_diffusers_draws_what_is_drawn_here(make: Any, tmp_path: Path, network: dict[str, Any]) -> None:
    """From the folder as it is. PixArt's pipeline is given the tokens of the CLIP, each of which counts."""
    from diffusers import DiffusionPipeline

    folder = run(make(network), job(tmp_path / "run", steps=12, lr=3e-2))
    pipe, steps, flow = Pipeline(load(folder)), 4, "schedule" not in network
    theirs = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    walk: dict[str, Any] = {"sampler": "ddim"}
    if flow:
        theirs.scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config, solver_order=1)
        theirs.scheduler.set_timesteps(steps)
        values = {"values": tuple(theirs.scheduler.sigmas.tolist()), "unit": "u"}
        walk = {"sampler": "euler", "spacing": "file", "spacing_set": values}
    found = pipe("fox", negative_prompt="", seed=5, steps=steps, guidance_scale=3.0, **walk).latents
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"}
    given["latents"] = Noise((5,), (4, 8, 8)).start()
    if network is UNET:
        given["prompt"] = "fox"
    else:
        one, other = (pipe.bundle.text([text]).tokens for text in ("fox", ""))
        ones = torch.ones(1, one.shape[1], dtype=torch.long)
        given |= {"prompt_embeds": one, "negative_prompt_embeds": other, "negative_prompt": None}
        given |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones, "use_resolution_binning": False}
    wanted = theirs(**given).images
    off = float((found - wanted).abs().max() / wanted.abs().max())
    assert off < (2e-2 if flow else 1e-4)  # their times of a flow are cut to whole numbers


@pytest.mark.parametrize("kind", [DIT, TEXT_DIT])
def test_the_learned_variance_is_trained_with_hybrid(make: Any, tmp_path: Path, kind: dict[str, Any]) -> None:
    network = {**kind, "schedule": "linear", "prediction": "eps", "variance": True}
    with pytest.raises(UsageError, match="go together"):
        make(network)
    folder = run(make(network, objective={"levels": "uniform", "hybrid": 0.001}), job(tmp_path / "run"))
    transformer = load(folder).model.network.transformer
    half = getattr(transformer, "proj_out_2" if kind is DIT else "proj_out").weight.reshape(2, 2, 8, -1)[:, :, 4:]
    assert half.abs().max() > 0  # only the bound reaches it


def test_the_fresh_weights_follow_from_the_seed(make: Any) -> None:
    state = torch.random.get_rng_state()
    one, two = make(UNET).source, make(UNET, weights_seed=1).source
    assert torch.equal(state, torch.random.get_rng_state())
    assert one != two
    assert make(UNET).source == one
    weights = [load(f).model.network.unet.conv_in.weight for f in (one, two)]
    assert not torch.equal(*weights)


def test_a_caption_is_told_by_a_clip(make: Any, saved: Any) -> None:
    with pytest.raises(UsageError, match=r"told captions by a CLIP; the text encoder of task.model .* is none"):
        _ = replace(make(TEXT_DIT), model=str(saved("pixart sigma"))).source


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({**UNET, "layers": [1]}, "one value per resolution"),
        ({**UNET, "prediction": "eps"}, "goes with schedule flow"),
        ({**UNET, "schedule": "linear", "prediction": "eps", "zero_terminal": True}, "v or x0"),
        ({**DIT, "heads": 3}, "not a multiple of 3"),
        ({**TEXT_DIT, "channels": [18]}, "a text_dit takes a multiple of 4"),
        ({**UNET, "chanels": [8]}, "did you mean 'channels'"),
    ],
)
def test_networks_that_cannot_be_are_refused(make: Any, network: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(network)
