"""The jobs of the built-in model, at toy size: they train, resume bit for bit, export what diffusers and `load` read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm_pipe import Pipeline
from train.data.latents import LatentCache
from train.job import Job
from train.loop import run
from train.tasks.clip import Clip
from train.tasks.codec import Codec
from train.tasks.latent import Latent
from train.tasks.parse import NEAR, Parse, ParseLoss
from train.world import objects, render
from train.world.words import make_tokenizer


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """codec/, text/ and model/ exports of a toy run of all stages."""
    folder = tmp_path_factory.mktemp("stages")
    small = {"batch": 2, "log_every": 1, "save_every": 1, "warmup": 1}
    codec = Codec(channels=(8, 8, 8), latent_channels=4, groups=4)
    run(codec, Job(output=str(folder / "codec"), steps=2, **small))
    clip = Clip(width=16, image_width=16, text_layers=1, image_layers=1, heads=2, projection=8, patch=32)
    run(clip, Job(output=str(folder / "text"), steps=2, **small))
    run(latent(folder), Job(output=str(folder / "model"), steps=3, **small))
    return folder


def latent(folder: Path) -> Latent:
    parts = {"codec": str(folder / "codec" / "export"), "text": str(folder / "text" / "export")}
    return Latent(**parts, scenes=6, channels=(32, 32), attention=(False, True), layers=(0, 1), heads=2)


def test_the_export_is_a_model_that_loads_and_draws(stages: Path) -> None:
    pipe = Pipeline.from_pretrained(str(stages / "model" / "export"), "cpu", "fp32")
    for settings in ({}, {"height": 32, "spacing": "trailing"}):
        out = pipe("a fox on a blue background", seed=1, steps=2, **settings)
        assert out.images[0].size == (64, settings.get("height", 64))


def test_diffusers_reads_the_export_and_agrees(stages: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = stages / "model" / "export"
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "latents": start, "output_type": "latent"}
    expected = theirs("a fox on blue", height=64, width=64, **settings).images
    assert torch.isfinite(expected).all()


def test_a_resumed_run_has_the_same_weights(stages: Path) -> None:
    small = {"batch": 2, "log_every": 1, "save_every": 1, "warmup": 1}
    for stop in (2, 0):
        run(latent(stages), Job(output=str(stages / "again"), steps=3, stop=stop, **small))
    name = "export/unet/diffusion_pytorch_model.safetensors"
    straight, again = load_file(stages / "model" / name), load_file(stages / "again" / name)
    assert all(torch.equal(straight[k], again[k]) for k in straight)


def test_the_untrained_network_starts_at_zero(stages: Path) -> None:
    net = latent(stages).net()
    loss = net(latent(stages).batch(0, range(4)))["loss"]
    batch = latent(stages).batch(0, range(4))
    assert loss.item() == pytest.approx((batch["noise"] - batch["x0"]).square().mean().item(), rel=1e-5)


def test_training_goes_on_from_an_exported_model(stages: Path, tmp_path: Path) -> None:
    folder = stages / "model" / "export"
    net = replace(latent(stages), start=str(folder)).net()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[n], t) for n, t in net.model.network.unet.state_dict().items())
    again = tmp_path / "again"
    again.mkdir()
    replace(latent(stages), start=str(folder)).export(net, again)
    assert str(stages) not in (again / "unet" / "config.json").read_text()  # no path of this machine


def test_relations_come_after_order(stages: Path) -> None:
    task = Parse(str(stages / "text" / "export"), plain=100)
    tokenizer = make_tokenizer(24)
    right, below = (tokenizer(w).input_ids[1] for w in ("right", "below"))
    early, late = (task.batch(0, range(a, a + 100))["tokens"] for a in (0, 100))
    assert not ((early == right) | (early == below)).any()
    assert (late == right).any()
    assert (late == below).any()


def test_parsing_writes_the_words_onto_the_slots(stages: Path) -> None:
    task = Parse(str(stages / "text" / "export"), keep=0.5)
    net, batch = task.net(), task.batch(0, range(4))
    first = net(batch)
    assert first["moved"].item() == 0
    assert torch.equal(first["loss"], first["named"] + NEAR * first["near"])
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        found = net(batch)
        found["loss"].backward()
        optimiser.step()
    assert found["named"] < 0.2 * first["named"]
    assert found["near"] < first["near"]
    assert found["right"] == 1
    torch.testing.assert_close(found["loss"], found["named"] + NEAR * found["near"] + 0.5 * found["moved"])
    assert found["moved"] > 0


def test_slots_are_told_apart_and_words_are_the_old_encoders(stages: Path) -> None:
    task = Parse(str(stages / "text" / "export"))
    net = task.net()
    tokens = torch.tensor(make_tokenizer(24)(["a fox"], padding="max_length").input_ids)
    word = net.before(tokens).last_hidden_state[0, 2]
    torch.testing.assert_close(net.named[objects().index("fox")], word)
    assert torch.pdist(net.offsets).min() > 0.1 * net.spread**0.5
    wide = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))  # fewer words than width: a right angle is possible
    loss = ParseLoss(None, None, wide, 1.0)
    torch.testing.assert_close(loss.offsets @ (wide - wide.mean(0)).T, torch.zeros(4, 5), atol=1e-4, rtol=0)


def test_a_parsed_encoder_stands_where_the_old_one_stood(stages: Path, tmp_path: Path) -> None:
    model = stages / "model" / "export"
    run(Parse(str(model)), Job(output=str(tmp_path), batch=2, steps=2, warmup=1, ema=0.0))
    old, new = (load_file(f / "text_encoder" / "model.safetensors") for f in (model, tmp_path / "export"))
    assert any(not torch.equal(old[k], new[k]) for k in old)
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (model / unet).read_bytes() == (tmp_path / "export" / unet).read_bytes()
    Pipeline.from_pretrained(str(tmp_path / "export"), "cpu", "fp32")


def test_a_batch_is_a_pure_function_of_its_ids(stages: Path) -> None:
    task = latent(stages)
    whole, part = task.batch(3, range(8)), task.batch(3, range(4, 8))
    assert all(torch.equal(whole[k][4:], part[k]) for k in whole)
    assert not torch.equal(task.batch(4, range(4))["noise"], whole["noise"][:4])


def test_conditioning_is_dropped_at_its_rate(stages: Path) -> None:
    task = latent(stages)
    tokens = task.batch(0, range(2000))["tokens"]
    empty = (tokens[:, 1] == tokens[0].max()).float().mean()  # the end token stands right behind the start
    assert 0.08 < empty < 0.12


def test_latents_have_unit_scale_and_a_key_of_their_own(stages: Path, tmp_path: Path) -> None:
    vae = stages / "codec" / "export" / "vae"
    cache = LatentCache.of(vae, 64, tmp_path)
    assert cache.shape == (4, 16, 16)
    assert cache.latents.float().std().item() == pytest.approx(1, abs=0.15)
    assert len(list(tmp_path.iterdir())) == 1
    LatentCache.of(vae, 65, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:  # another world has latents of its own
        patch.setattr("train.data.latents.render", lambda scene: 255 - render(scene))
        LatentCache.of(vae, 65, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    order = [cache.row(0, i) for i in range(128)]
    assert sorted(order[:64]) == sorted(order[64:]) == list(range(64))
    assert order[:64] != order[64:]


def test_a_codec_lends_its_outer_layers(stages: Path) -> None:
    deep = Codec(channels=(8, 8, 8, 8), latent_channels=4, groups=4).net().codec
    deep.save_pretrained(stages / "deep")
    flat = Codec(channels=(8, 8, 8), latent_channels=4, groups=4, start=str(stages / "deep")).net().codec
    assert torch.equal(flat.encoder.conv_in.weight, deep.encoder.conv_in.weight)
    old, new = (m.decoder.up_blocks[-1].resnets[0].conv1.weight for m in (deep, flat))
    assert torch.equal(old, new)


def test_windows_hold_an_object() -> None:
    images = Codec(crop=32, vary=0.0).batch(0, range(40))["images"]
    assert images.shape == (40, 3, 32, 32)
    assert np.mean([i.std().item() > 0.02 for i in images]) > 0.95
