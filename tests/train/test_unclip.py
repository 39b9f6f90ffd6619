"""Models that are told a picture's vector: what they are told in training, the input that begins as nothing, what comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import ModelError, Pipeline, UsageError, load
from ldm_pipe.cond import Cond
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.parts import vision
from train import validation
from train.__main__ import main
from train.data.order import stream
from train.job import Job
from train.loop import run
from train.tasks.controlnet import ControlNet
from train.tasks.dreambooth import Dreambooth
from train.tasks.finetune import Finetune
from train.tasks.unclip import Unclip, widen

WIDTH = 12  # of the vectors of the tiny image encoder


@pytest.fixture(scope="module")
def photos(pictures: Callable[..., Path]) -> Path:
    """Four pictures of one caption."""
    return pictures(("a fox on red",))


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory, saved: Callable[[str], Path]) -> Path:
    """The folder of a tiny image encoder, with what its pictures are normalised by."""
    place = shutil.copytree(saved("unclip") / "image_encoder", tmp_path_factory.mktemp("eye") / "clip")
    said = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 28}, "crop_size": 28}
    (place / "preprocessor_config.json").write_text(json.dumps(said))
    return place


@pytest.fixture
def make(photos: Path, saved: Any, tmp_path: Path, eye: Path) -> Callable[..., Any]:
    def task(kind: type = Unclip, model: str = "", **fields: Any) -> Any:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), "side": 32, **fields.pop("data", {})}
        return kind(table, model or str(saved("sd")), **{**({"encoder": str(eye)} if kind is Unclip else {}), **fields})

    return task


def drawn(folder: Path, shown: Path) -> Tensor:
    pipe = Pipeline.from_pretrained(str(folder), "cpu", "fp32", "sdpa")
    whole = ImagePrompt(0).applied(pipe, pipe.plan("a fox", seed=3, steps=2), Image.open(shown))
    return next(pipe.run(whole)).latents


def test_each_visit_is_told_its_own_picture_under_its_own_noise(make: Any, saved: Any) -> None:
    """By hand from the stream of the visit; the same from the cache and without one; zeros where it is blind."""
    told = {}
    for cache in ({}, {"cache": ""}):
        task = make(Finetune, str(saved("unclip")), blind=0.0, data=cache).grouped(2)
        task.net()
        told[bool(cache)] = task.batch(7, range(6))["text_picture"]
    torch.testing.assert_close(told[True], told[False], rtol=1e-4, atol=1e-4)
    vectors, levels = task.bundle.vectors, []
    for k in range(6):
        seen = task.dataset.seen(7, k)
        rng = stream(7, "picture", seen.row, seen.visit)
        rng.random()
        levels.append(int(rng.integers(1000)))
        noise = torch.from_numpy(rng.standard_normal((1, WIDTH), dtype=np.float32))
        wanted = vectors([task.dataset.picture(seen)], noise, levels[-1])[0]
        torch.testing.assert_close(told[True][k], wanted, rtol=1e-4, atol=1e-4)
    assert len(set(levels)) == 6
    some = make(Finetune, str(saved("unclip")), blind=0.4, data={"cache": ""}).batch(0, range(60))["text_picture"]
    assert 12 < int((some == 0).all(1).sum()) < 36
    for kind, fields in ((Finetune, {"blind": 1.0}), (Dreambooth, {"prior": ""})):
        blind = make(kind, str(saved("unclip")), data={"cache": ""}, **fields)
        assert "text_picture" not in blind.batch(0, range(2))


def test_the_input_begins_as_nothing_and_learns_whose_picture_it_is(make: Any, saved: Any, seen: Any, tmp_path: Path) -> None:
    """At first any vector leaves the network to the bit; then, of one caption, its own picture helps and another's does not."""
    for name, colour in (("red", (250, 10, 10)), ("green", (10, 250, 10)), ("blue", (10, 10, 250)), ("white", (250,) * 3)):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a fox on red")
    late = {"levels": {"name": "logit_normal", "mean": 3.0, "deviation": 0.5}}  # where x itself tells nothing
    task = make(model=str(saved("sd v-prediction")), objective=late, blind=0.0, data={"path": str(tmp_path)}).grouped(4)
    net = task.net()
    network = task.bundle.model.network
    x, time, tokens = torch.randn(2, 4, 8, 8), torch.tensor([500, 20]), torch.randn(2, 8, 16)
    with torch.no_grad():
        none = network(x, time, Cond(tokens=tokens))
        some = network(x, time, Cond(tokens=tokens, extras={"picture": torch.randn(2, 2 * WIDTH)}))
    assert torch.equal(none, some)
    assert torch.allclose(seen(task.bundle.model), seen(load(saved("sd v-prediction")).model), atol=1e-5)
    optimiser = torch.optim.AdamW(net.parameters(), 5e-3)

    def batch(step: int) -> dict[str, Any]:  # the latents of a random codec are small
        found = task.batch(0, range(4 * step, 4 * step + 4))
        return {**found, "x0": 8 * found["x0"]}

    for step in range(200):
        optimiser.zero_grad()
        net(batch(step))["loss"].backward()
        optimiser.step()
    own, other = 0.0, 0.0
    with torch.no_grad():
        for step in range(200, 230):
            given = batch(step)
            own += float(net(given)["loss"])
            other += float(net({**given, "text_picture": given["text_picture"].roll(1, 0)})["loss"])
    assert own < 0.8 * other


def test_it_resumes_to_the_bit_and_is_what_diffusers_reads(make: Any, tmp_path: Path, photos: Path, job: Any) -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline
    from transformers import CLIPImageProcessorPil

    straight = run(make(), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(), job(tmp_path / "b", stop=stop))
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (straight / file).read_bytes() == (again / file).read_bytes()
    pictures = [photos / f"{k}.png" for k in (0, 1)]
    assert not torch.allclose(drawn(straight, pictures[0]), drawn(straight, pictures[1]), atol=1e-4)
    words = CLIPImageProcessorPil.from_pretrained(straight / "feature_extractor", local_files_only=True)
    theirs = StableUnCLIPImg2ImgPipeline.from_pretrained(straight, feature_extractor=words, local_files_only=True)
    ours, noise = load(straight), torch.randn(1, WIDTH)
    with torch.no_grad():
        pixels = theirs.feature_extractor(images=Image.open(pictures[0]), return_tensors="pt").pixel_values
        told = theirs.noise_image_embeddings(theirs.image_encoder(pixels).image_embeds, 40, noise)
        torch.testing.assert_close(ours.vectors([Image.open(pictures[0])], noise, 40), told, rtol=1e-4, atol=1e-4)
        x, time, tokens = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 8, 16)
        wanted = theirs.unet(x, time, encoder_hidden_states=tokens, class_labels=told).sample
        found = ours.model.network(x, time, Cond(tokens=tokens, extras={"picture": told}))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    more = make(model=str(straight), encoder="")  # it has the input, and goes on as it is
    assert more.source == straight


def test_vectors_are_whitened_by_the_pictures_of_the_training(
    make: Any, photos: Path, eye: Path, saved: Any, tmp_path: Path
) -> None:
    tower = vision(eye)
    seen = tower.embeds(tower.pixels([Image.open(photos / f"{k}.png") for k in range(4)]))
    vectors = load(make().source).vectors
    torch.testing.assert_close(vectors.mean, seen.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors.std, seen.std(0, keepdim=True), rtol=1e-4, atol=1e-5)
    for name, count in (("one", 1), ("same", 3)):
        (tmp_path / name).mkdir()
        widen(saved("sd"), tmp_path / name, eye, [Image.open(photos / "0.png")] * count)
        assert torch.equal(load(tmp_path / name).vectors.std, torch.ones(1, WIDTH))


def test_what_the_old_model_said_of_pictures_is_gone(make: Any, saved: Any, tmp_path: Path) -> None:
    """Stable Diffusion's folders have a preprocessor of their own, for the checker; guidance stays what it was."""
    frame = shutil.copytree(saved("sd"), tmp_path / "frame")
    for part in ("feature_extractor", "safety_checker"):
        (frame / part).mkdir()
        (frame / part / "preprocessor_config.json").write_text('{"image_mean": [9, 9, 9]}')
    made = make(model=str(frame)).source
    assert load(made).vectors.tower.mean == (0.5, 0.4, 0.3)
    assert not (made / "safety_checker").exists()
    assert Pipeline.from_pretrained(str(made), "cpu").bundle.defaults.guidance_scale == 7.5


def test_held_out_pictures_are_told_too(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr(validation, "banded_loss", lambda model, latents, conds: heard.extend(conds) or {})
    task = make(held_out=2)
    task.validate(task.net(), tmp_path)
    assert [float(c.extras["picture"].abs().max()) > 0 for c in heard] == [True, True]


def test_the_built_in_model_takes_it(make: Any, tmp_path: Path, photos: Path, job: Any) -> None:
    export = run(make(model="builtin", encoder="builtin", data={"side": 64}), job(tmp_path / "a", steps=2))
    assert load(export).vectors.tower.mean == (0.5,) * 3
    assert not torch.equal(drawn(export, photos / "0.png"), drawn(export, photos / "1.png"))


def test_what_does_not_go_is_said_in_a_line(make: Any, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 to 1"):
        make(blind=2.0)
    with pytest.raises(UsageError, match="kept there"):
        _ = make(data={"cache": ""}).source
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="holds no pictures"):
        _ = make(data={"path": str(tmp_path / "none")}).source
    with pytest.raises(UsageError, match="takes no controlnet"):
        make(ControlNet, str(saved("unclip")), hint="edges").net()
    broken = shutil.copytree(saved("sd"), tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="vae"):
        _ = make(model=str(broken)).source
    with pytest.raises(UsageError, match="takes a U-Net with one CLIP and no classes, not Stable Diffusion XL"):
        _ = make(model=str(saved("sdxl"))).source
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="only safetensors is read"):
        _ = make(encoder=str(tmp_path)).source
    task = make()
    for encoder in ("", "/no/such"):
        with pytest.raises(UsageError, match="takes the folder of a CLIP, or of its image half"):
            _ = Unclip(task.data, task.model, encoder=encoder).source
        faults = Unclip(task.data, task.model, encoder=encoder).check(Job(str(tmp_path), 1, batch=1))
        assert [f.where for f in faults if f.fatal] == ["[task]"]


def test_the_recipe_runs_from_the_command_line(photos: Path, saved: Any, eye: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--config", "configs/unclip.toml", "--set", f"data.path={photos}", "--set", f"task.model={saved('sd')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}", "--set", "data.side=32"]
    words += ["--set", f"task.encoder={eye}", "--set", "job.steps=2", "--set", "job.batch=2"]
    assert main(["check", *words]) == 0, capsys.readouterr().out
    assert main(words) == 0, capsys.readouterr().err
    assert load(tmp_path / "run" / "export").family == "unclip"
