"""What is made of a picture before a control reads it: edges where there are edges, at the size of the image, on record."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm_pipe import UsageError, recipe
from ldm_pipe.cli import main
from ldm_pipe.doors.controls import Controls, Window
from ldm_pipe.hints import canny, grey

Tiny = Callable[[str], Path]


def square(side: int = 64) -> Image.Image:
    """A white square on black, from a quarter to three quarters of the side."""
    picture = Image.new("RGB", (side, side))
    ImageDraw.Draw(picture).rectangle((side // 4, side // 4, 3 * side // 4 - 1, 3 * side // 4 - 1), fill="white")
    return picture


def test_the_edges_of_a_square_are_its_border() -> None:
    pytest.importorskip("skimage")
    found = np.asarray(canny(square()))
    assert found.shape == (64, 64, 3)
    assert set(np.unique(found)) == {0, 255}
    rows, columns = np.nonzero(found[..., 0])
    near = np.minimum(np.abs(rows[:, None] - [15.5, 47.5]).min(1), np.abs(columns[:, None] - [15.5, 47.5]).min(1))
    assert near.max() <= 1
    assert 4 * 26 < len(rows) < 4 * 2 * 34
    assert not np.asarray(canny(Image.new("RGB", (64, 64), "teal"))).any()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    with pytest.raises(UsageError, match=r"pip install ldm_pipe\[control\]"):
        canny(square())


def test_a_wrong_way_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'canny'"):
        Window(prepare="cany")


def test_it_is_made_at_the_size_of_the_image_and_replays(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nets: list[Any]
) -> None:
    """And the recipe says how."""
    monkeypatch.chdir(tmp_path)
    nets[0].save_pretrained("lines")
    colours = Image.effect_noise((96, 96), 90).convert("RGB")
    colours.paste((200, 30, 30), (0, 0, 48, 96))
    colours.save("one.png")
    seen: list[tuple[int, int]] = []

    def watched(picture: Image.Image) -> Image.Image:
        seen.append(picture.size)
        return grey(picture)

    monkeypatch.setitem(sys.modules["ldm_pipe.hints"].PREPARE, "grey", watched)
    flags = ["--model", str(tiny("eps")), "--dtype", "fp32", "--quiet"]
    ask = ["-p", "a fox", "--seed", "3", "--control", "lines", "--control-image", "one.png", *flags]
    assert main([*ask, "--set", "control.prepare=grey", "-o", "grey.png"]) == 0
    assert main([*ask, "-o", "plain.png"]) == 0
    assert seen == [(32, 32)]
    assert recipe.read("grey.png").controls[0]["prepare"] == "grey"
    assert not np.array_equal(np.asarray(Image.open("grey.png")), np.asarray(Image.open("plain.png")))
    capsys.readouterr()
    assert main(["--replay", "grey.png", "--verify", "--control", "lines", "--control-image", "one.png", *flags]) == 0
    assert capsys.readouterr().out == "grey.png: bit-equal\n"
    assert Controls.of(["lines"], 1, [], {"prepare": "grey"}).window.prepare == "grey"
