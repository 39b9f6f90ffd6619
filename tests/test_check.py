"""`generate --check`: every family says what it is; nothing is sampled; what is broken is said as at a run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from ldm_pipe import cli
from ldm_pipe.files import sha256

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")


@pytest.mark.parametrize("name", ["sd3", "flux dev", "sana", "dit", "sd pix2pix", "pixart alpha", "sdxl refiner"])
def test_every_family_says_what_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.save(name, tmp_path / "m")
    capsys.readouterr()
    size = ["--height", "64", "--width", "64", "--steps", "3"]
    assert cli.main(["--model", str(folder), "--check", "--json", *size]) == 0
    found = json.loads(capsys.readouterr().out)
    assert name.replace(" ", "-").startswith(found["family"])
    assert all(count > 0 or (part, name) == ("text", "dit") for part, count in found["parameters"].items())
    assert found["image"]["bytes"] > 0
    assert (found["image"]["width"], found["image"]["steps"]) == (64, 3)
    for file, facts in found["files"].items():
        assert facts["sha256"] == sha256(folder / file)
        assert facts["tensors"].keys() <= {"F32"}
    assert cli.main(["--model", str(folder), "--check", *size]) == 0
    said = capsys.readouterr().out
    assert "loaded whole and finite" in said
    assert str(tmp_path) not in said


def test_what_is_broken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.save("dit", tmp_path / "m")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345678" * 9)
    assert cli.main(["--model", str(folder), "--check"]) == 2
    assert "damaged or no safetensors file" in capsys.readouterr().err
    assert cli.main(["--check", "--prompts", "x.txt"]) == 2
    assert "--check samples nothing" in capsys.readouterr().err


def test_how_a_prompt_is_read_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a ((fox) on [red:blue:0.5] BREAK hat AND a (cat:.8) :1.2"
    assert cli.main(["--check", "--device", "cpu", "--height", "64", "--prompt", prompt]) == 0
    said = capsys.readouterr().out
    assert "'a (fox:1.2100000000000002)( on :1.1)[(red:1.1):(blue:1.1):0.5] BREAK (hat:1.1)', 2 window(s)" in said
    assert "'a (cat:0.8) :1.2', 1 window(s)" in said
    assert "never closed" in said
    assert cli.main(["--check", "--device", "cpu", "--json", "--plain-prompt", "--prompt", prompt]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"][0]["parts"] == [prompt]
