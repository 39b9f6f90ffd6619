"""`--attention-maps`: a sheet beside every image, one place for each word, and not a bit of the image changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ldm_pipe.looking.attention_maps import recorded_in
from ldm_pipe.pipeline import Output, Pipeline


def test_a_sheet_for_every_image_and_no_bit_changed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")
    plan = pipe.plan(["a fox, on blue", "a fox"], seed=3, steps=2)
    plain = Output.joined(list(pipe.run(plan)))
    out = Output.joined(list(pipe.run(recorded_in(str(tmp_path), pipe, plan))))
    assert [i.tobytes() for i in out.images] == [i.tobytes() for i in plain.images]
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["001-3.png", "002-3.png"]
    assert "2 sheet(s) of attention maps" in out.notices[-1]
    long, short = (Image.open(f).size for f in sorted(tmp_path.iterdir()))
    assert long[0] * long[1] > short[0] * short[1], "four words need more room than two"
