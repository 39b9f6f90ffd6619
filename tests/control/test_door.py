"""`--control FOLDER --control-image FILE`: steered, recorded, replayed, and refused in one sentence."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm_pipe import LdmError, Pipeline, UsageError, recipe
from ldm_pipe.cli import main
from ldm_pipe.control.controlnet import ControlNet
from ldm_pipe.control.ip_adapter import IPAdapter
from ldm_pipe.control.t2i_adapter import T2IAdapter
from ldm_pipe.doors.controls import Controls
from ldm_pipe.image import to_tensor
from ldm_pipe.networks.image_prompt import ImageAdapter
from ldm_pipe.parts import vision
from ldm_pipe.plan import patched
from ldm_pipe.request import Request

Tiny = Callable[[str], Path]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nets: list[Any], adapters: list[Any]) -> Path:
    """A working folder with a ControlNet, an adapter and two pictures."""
    monkeypatch.chdir(tmp_path)
    nets[0].save_pretrained("lines")
    adapters[0].save_pretrained("sketch")
    for name, seed in (("one", 1), ("two", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    return tmp_path


@pytest.fixture
def flags(tiny: Tiny) -> list[str]:
    return ["--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"]


def test_it_steers_and_replays(place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made = ["-p", "a fox", "--seed", "3", *flags]
    control = ["--control", "lines", "--control-image", "one.png", "--control", "sketch", "--control-image", "two.png"]
    scales = ["--control-scale", "0.8", "--control-scale", "0.5", "--set", "control.lo=0.2"]
    assert main([*made, *control, *scales, "-o", "steered.png"]) == 0
    assert main([*made, "-o", "plain.png"]) == 0
    steered, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("steered", "plain"))
    assert not np.array_equal(steered, plain)
    rows = recipe.read("steered.png").controls
    assert [(r["name"], r["scale"], r["lo"]) for r in rows] == [("lines", 0.8, 0.2), ("sketch", 0.5, 0.2)]
    capsys.readouterr()
    assert main(["--replay", "steered.png", "--verify", *control, *flags]) == 0
    assert capsys.readouterr().out == "steered.png: bit-equal\n"
    assert main(["--replay", "steered.png", "--verify", *flags]) == 2
    assert "made with 2, got 0" in capsys.readouterr().err
    swapped = [w.replace("one.png", "x").replace("two.png", "one.png").replace("x", "two.png") for w in control]
    assert main(["--replay", "steered.png", "--verify", *swapped, *flags]) == 2
    assert "is not the picture" in capsys.readouterr().err
    other = [w.replace("lines", "x").replace("sketch", "lines").replace("x", "sketch") for w in control]
    assert main(["--replay", "steered.png", "--verify", *other, *flags]) == 2
    assert "not the network" in capsys.readouterr().err


def test_it_is_what_python_makes_of_the_same(place: Path, tiny: Tiny, nets: list[Any], adapters: list[Any]) -> None:
    """Pictures in 0..1, brought to the size of the image."""
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    picture, whole = Image.open("one.png"), pipe.plan("a fox", seed=3)
    hint = to_tensor([picture]) / 2 + 0.5
    by_hand = [ControlNet(nets[0], hint, 0.8, lo=0.3), T2IAdapter.of(adapters[0], hint, scale=0.8, lo=0.3)]
    for folder, patch in zip(("lines", "sketch"), by_hand, strict=True):
        controls = Controls.of([folder], 1, [0.8], {"lo": "0.3"})
        expected = next(pipe.run(patched(whole, pipe.bundle.model, [patch]))).latents
        assert torch.equal(next(pipe.run(controls.applied(pipe, whole, [picture]))).latents, expected)
        large = picture.resize((96, 96), Image.Resampling.NEAREST)
        near = next(pipe.run(controls.applied(pipe, whole, [large]))).latents
        assert float((near - expected).norm() / expected.norm()) < 0.3


def test_scale_0_is_no_control(place: Path, flags: list[str]) -> None:
    made = ["-p", "a fox", "--seed", "3", *flags]
    assert main([*made, "--control", "lines", "--control-image", "one.png", "--control-scale", "0", "-o", "none.png"]) == 0
    assert main([*made, "-o", "plain.png"]) == 0
    none, plain = (np.asarray(Image.open(f"{n}.png")) for n in ("none", "plain"))
    assert np.array_equal(none, plain)


def test_a_picture_as_a_prompt_steers_and_replays(
    place: Path, flags: list[str], reference: Path, clip_eye: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a ControlNet, whose picture alone is prepared; the image encoder is on record too."""
    made = ["-p", "a fox", "--seed", "3", *flags]
    net = ["--control", "lines", "--control-image", "two.png", "--set", "control.prepare=grey"]
    prompt = ["--control", f"ip_adapter({reference / 'base.safetensors'})", "--control-image", "one.png"]
    assert main([*made, *prompt, *net, "--control-scale", "0.6", "--control-scale", "0.3", "-o", "both.png"]) == 0
    assert main([*made, *net, "--control-scale", "0.3", "-o", "net.png"]) == 0
    both, alone = (np.asarray(Image.open(f"{n}.png")) for n in ("both", "net"))
    assert not np.array_equal(both, alone)
    row = recipe.read("both.png").controls[0]
    assert (row["name"], row["scale"], len(row["sha256"]), len(row["image_encoder"])) == ("base.safetensors", 0.6, 64, 64)
    capsys.readouterr()
    assert main(["--replay", "both.png", "--verify", *prompt, *net[:4], *flags]) == 0
    assert capsys.readouterr().out == "both.png: bit-equal\n"
    other = place / "other"
    shutil.copytree(reference / "image_encoder", other)
    copy.deepcopy(clip_eye).half().float().save_pretrained(other)
    swapped = f"ip_adapter({reference / 'base.safetensors'}, image_encoder={other})"
    assert main(["--replay", "both.png", "--control", swapped, *prompt[2:], *net[:4], *flags]) == 2
    assert "not the network" in capsys.readouterr().err


def test_it_is_what_python_makes_of_the_same_prompt(place: Path, tiny: Tiny, reference: Path) -> None:
    """The picture is not brought to the size of the image."""
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    picture, whole = Image.open("one.png").resize((50, 40)), pipe.plan("a fox", seed=3)
    adapter = ImageAdapter.of(load_file(reference / "plus.safetensors"), "plus")
    patch = IPAdapter.of(adapter, vision(reference / "image_encoder"), [picture], scale=0.8, lo=0.3)
    expected = next(pipe.run(patched(whole, pipe.bundle.model, [patch]))).latents
    controls = Controls.of([f"ip_adapter({reference / 'plus.safetensors'})"], 1, [0.8], {"lo": "0.3"})
    assert torch.equal(next(pipe.run(controls.applied(pipe, whole, [picture]))).latents, expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ip_adapter(none.safetensors)", "no .safetensors file"),
        ("ip_adapter(one.png)", "no .safetensors file"),
        ("ip_adapter(REFERENCE/base.safetensors, image_encoder=nowhere)", "'nowhere' is no folder"),
        ("ip_adapter(REFERENCE/base.safetensors, image_encoder=lines)", "cannot be loaded|asks for|tensor"),
        ("ip_adapter()", "of the form ip_adapter"),
        ("ip_adapter(a, b, c)", "of the form ip_adapter"),
        ("REFERENCE/base.safetensors", r"is named as ip_adapter\(FILE\)"),
    ],
)
def test_a_wrong_image_prompt_is_one_sentence(
    text: str, words: str, place: Path, flags: list[str], reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = text.replace("REFERENCE", str(reference))
    assert main(["-p", "a fox", *flags, "--control", text, "--control-image", "one.png"]) == 2
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"control": ["ip_adapter(a)"], "control_image": ["b"], "set": ["control.guess=true"]}, "sees the picture as it is"),
        ({"control": ["ip_adapter(a"], "control_image": ["b"]}, "of the form ip_adapter"),
        ({"control": ["a"]}, "go together, got 1 and 0"),
        ({"control_scale": ["1"]}, "go with --control FOLDER"),
        ({"set": ["control.lo=0.5"]}, "go with --control FOLDER"),
        ({"control": ["a"], "control_image": ["b"], "control_scale": ["1", "2"]}, "one for each"),
        ({"control": ["a"], "control_image": ["b"], "set": ["control.low=0.5"]}, "did you mean 'lo'"),
        ({"control": ["a"], "control_image": ["b"], "set": ["control.lo=0.5", "control.hi=0.4"]}, "0 <= lo <= hi"),
        ({"patch": ["controlnet(scale=2)"]}, "use --control"),
    ],
)
def test_what_does_not_go_together(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Request.of({"prompt": ["a fox"], **given}).settings(None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"_class_name": "Evil"})),
            "takes ControlNetModel or T2IAdapter or SD3",
        ),
        (lambda f: (f / "diffusion_pytorch_model.safetensors").write_bytes(b"x"), "is damaged"),
    ],
)
def test_a_damaged_folder_is_named(
    damage: Callable[[Path], Any], words: str, place: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(place / "lines")
    code = main(["-p", "a fox", *flags, "--control", "lines", "--control-image", "one.png"])
    assert code == LdmError.exit_code + 1 == 2
    assert words in capsys.readouterr().err
