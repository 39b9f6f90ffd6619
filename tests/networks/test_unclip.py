"""unCLIP: a picture beside the words is told to the network as diffusers tells it, noised by each image's own seed."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm_pipe import ModelError, Pipeline, UsageError, load, recipe
from ldm_pipe.cli import main
from ldm_pipe.cond import Cond
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.guidance.compose import Compose
from ldm_pipe.level import Level
from ldm_pipe.networks.unclip import waves
from ldm_pipe.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
tiny_families = importlib.import_module("tiny_families")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("unclip") / "model"
    tiny_families.save("unclip", place)
    settings = {"size": [32, 32], "steps": 3, "guidance_scale": 3.0, "sampler": "ddim", "spacing": "leading"}
    (place / "ldm_pipe.json").write_text(json.dumps(settings))
    return place


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(folder), "cpu", "fp32")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8))


def drawn(pipe: Pipeline, level: int, count: int = 1, seed: int = 5, shown: int = 1, **more: Any) -> torch.Tensor:
    whole = ImagePrompt(level).applied(pipe, pipe.plan("a fox", seed=seed, num_images=count, **more), picture(shown))
    return torch.cat([out.latents for out in pipe.run(whole)])


@pytest.mark.parametrize("level", [0, 37, 999])
def test_the_vector_is_diffusers(folder: Path, pipe: Pipeline, level: int) -> None:
    """Given the same noise."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    theirs = StableUnCLIPImg2ImgPipeline.from_pretrained(folder, local_files_only=True)
    noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    pixels = theirs.feature_extractor(images=picture(1), return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = theirs.image_encoder(pixels).image_embeds.expand(2, -1)
        expected = theirs.noise_image_embeddings(seen, level, noise)
    torch.testing.assert_close(pipe.bundle.vectors([picture(1)], noise, level), expected, rtol=1e-4, atol=1e-4)
    assert waves(3.0, 5).shape == (5,)


def test_the_picture_and_its_noise_show(pipe: Pipeline) -> None:
    plain = drawn(pipe, 0)
    assert not torch.allclose(drawn(pipe, 0, shown=2), plain, atol=0.1)
    assert not torch.allclose(drawn(pipe, 400), plain, atol=0.1)
    assert not torch.allclose(next(pipe.run(pipe.plan("a fox", seed=5))).latents, plain, atol=0.1)


def test_each_image_has_its_own_noise_in_any_batch(pipe: Pipeline) -> None:
    both = drawn(pipe, 300, count=2)
    for k in range(2):
        torch.testing.assert_close(drawn(pipe, 300, seed=5 + k)[0], both[k], rtol=1e-4, atol=1e-3)
    apart = drawn(pipe, 300, count=2, batch_size=1)
    torch.testing.assert_close(apart, both, rtol=1e-4, atol=1e-3)


def test_branches_of_a_rule_see_it_and_no_picture_is_zeros(pipe: Pipeline) -> None:
    whole = pipe.plan("a fox", Compose(("cond", "text:a cat"), (2.0, 1.0)), seed=5)
    whole = replace(whole, conds={"own": Cond(tokens=torch.zeros(1, 8, 16)), **whole.conds})
    conds = ImagePrompt(10).applied(pipe, whole, picture(1)).conds
    told = {n: c(Level(0.5, 0.5)) if callable(c) else c for n, c in conds.items()}
    assert set(told) == {"cond", "uncond", "text:a cat", "own"}
    assert not told["uncond"].extras["picture"].any()
    assert torch.equal(told["cond"].extras["picture"], told["text:a cat"].extras["picture"])
    x, time, tokens = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 8, 16)
    none, zeros = Cond(tokens=tokens), Cond(tokens=tokens, extras={"picture": torch.zeros(1, 24)})
    with torch.no_grad():
        assert torch.equal(pipe.bundle.model.network(x, time, none), pipe.bundle.model.network(x, time, zeros))


def test_from_the_command_line_and_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a prompt too; on record, and replayed with the same picture alone."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("one.png")
    picture(2).save("two.png")
    flags = ["--model", str(folder), "--dtype", "fp32", "--quiet"]
    shown = ["--image-prompt", "one.png", "--noise-level", "30"]
    assert main([*shown, "--seed", "4", "--num-images", "2", "-o", "made", *flags]) == 0
    files = capsys.readouterr().out.split()
    assert recipe.read(files[1]).image_prompt == {"noise_level": 30}
    assert main(["--replay", files[1], "--verify", "--image-prompt", "one.png", *flags]) == 0
    assert capsys.readouterr().out.endswith("bit-equal\n")
    for wrong, words in ((["--image-prompt", "two.png"], "is not the picture"), ([], "is needed")):
        assert main(["--replay", files[1], "--verify", *wrong, *flags]) == 2
        assert words in capsys.readouterr().err
    assert main([*shown[:3], "1000", *flags]) == 2
    assert "this model takes 0 to 999" in capsys.readouterr().err


def test_another_model_is_refused(tiny: Callable[[str], Path]) -> None:
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    with pytest.raises(UsageError, match=r"unCLIP.*ip_adapter"):
        ImagePrompt().applied(pipe, pipe.plan("a fox", seed=1), picture(1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"noise_level": "5"}, "goes with --image-prompt"),
        ({"image_prompt": "a.png", "noise_level": "-1"}, "whole numbers from 0"),
        ({"image_prompt": "a.png", "noise_level": "x"}, "a whole number"),
        ({"image_prompt": "a.png", "restore": "pool(4)", "input": "b.png"}, "not with --edit or --restore"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Request.of({"prompt": ["a fox"], **given}).settings(None)


def shorter(place: Path) -> None:
    file = place / "image_normalizer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t[:, :5].contiguous() for n, t in load_file(file).items()}, file)


def said(place: Path, part: str, **values: Any) -> None:
    config = next((place / part).glob("*config.json"))
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorter, "mismatched tensor 'mean'"),
        (lambda p: (p / "image_normalizer" / "diffusion_pytorch_model.safetensors").unlink(), "image_normalizer"),
        (lambda p: said(p, "image_normalizer", embedding_dim=13), "embedding_dim is 13; the image encoder gives 12"),
        (lambda p: said(p, "unet", class_embed_type=None), "projection|unexpected"),
        (lambda p: said(p, "image_noising_scheduler", beta_schedule="odd"), "beta_schedule 'odd'"),
        (lambda p: said(p, "feature_extractor", image_mean=[0.5]), "take three numbers each"),
        (lambda p: said(p, "feature_extractor", image_std=5), "take three numbers each"),
        (lambda p: shutil.rmtree(p / "image_encoder"), "image_encoder"),
    ],
)
def test_a_damaged_folder_is_named(damage: Callable[[Path], Any], words: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    damage(place)
    with pytest.raises(ModelError, match=words):
        load(place)
