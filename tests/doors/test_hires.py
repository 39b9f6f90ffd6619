"""`--hires 2x`: the first pass is the image at the model's size, the second starts from it, and both replay from the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline, UsageError, recipe
from ldm_pipe.cli import main
from ldm_pipe.doors.hires import Hires
from ldm_pipe.image import to_tensor
from ldm_pipe.levels import tail
from ldm_pipe.noise import Noise
from ldm_pipe.plan import Plan
from ldm_pipe.request import Request

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def test_the_second_pass_starts_from_the_first_enlarged(pipe: Pipeline) -> None:
    seen: list[Plan] = []

    def dress(plan: Plan) -> Plan:
        seen.append(plan)
        return plan

    whole = pipe.plan(["a fox", "two bees"], seeds=(1, 2), steps=6)
    found = Hires(2.0, 0.5).applied(pipe, whole, dress)
    first = next(pipe.run(whole)).images
    assert seen[0] == whole
    assert found.shape == (4, 16, 16)
    assert list(found.levels) == tail(whole.levels, 0.5)
    assert len(found.levels) == 4
    large = to_tensor([i.resize((64, 64), Image.Resampling.LANCZOS) for i in first])
    with torch.no_grad():
        x0 = pipe.bundle.codec.encode(large)
    expected = found.levels[0].mix(x0, Noise((1, 2), (4, 16, 16)).start())
    assert found.start is not None
    torch.testing.assert_close(found.start, expected, rtol=1e-5, atol=1e-5)
    out = next(pipe.run(found))
    assert out.images[0].size == (64, 64)
    alone = next(pipe.run(Hires(2.0, 0.5).applied(pipe, pipe.plan("two bees", seed=2, steps=6), dress)))
    torch.testing.assert_close(alone.latents[0], out.latents[1], rtol=1e-3, atol=1e-3)


def test_from_the_command_line_and_back(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a patch; the recipe alone makes it again."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"]
    made = ["-p", "a fox", "--seed", "7", "--num-images", "2", "--patch", "deepcache(2)", *flags]
    assert main([*made, "--hires", "1.5x", "--set", "hires.strength=0.75", "-o", "large-{seed}.png"]) == 0
    assert np.asarray(Image.open("large-8.png")).shape == (48, 48, 3)
    assert recipe.read("large-8.png").hires == {"factor": 1.5, "strength": 0.75}
    capsys.readouterr()
    assert main(["--replay", "large-8.png", "--verify", *flags]) == 0
    assert capsys.readouterr().out == "large-8.png: bit-equal\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hires": "big"}, "of the form 2x"), ({"hires": "1x"}, "a factor above 1"), ({"hires": "9x"}, "a factor above 1"),
        ({"hires": "2x", "set": ["hires.strength=0"]}, "strength above 0"), ({"set": ["hires.strength=1"]}, "goes with"),
        ({"hires": "2x", "init_image": "a.png"}, "a prompt alone"), ({"hires": "2x", "set": ["hires.strenth=1"]}, "strength"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Request.of({"prompt": ["a fox"], **given}).settings(None)
