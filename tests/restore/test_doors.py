"""`--restore`, `--mask --method` and `--outpaint`: from a picture to a picture, recorded, and made again from the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import Pipeline, UsageError, levels, registry
from ldm_pipe.cli import main
from ldm_pipe.doors.restoration import MADE_HERE, Inpainting, Restoration
from ldm_pipe.editing.source import Source
from ldm_pipe.image import to_tensor
from ldm_pipe.restore import defaults
from ldm_pipe.restore.latent import Latent
from ldm_pipe.restore.repaint import RePaint
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.settings import borders

Tiny = Callable[[str], Path]
SIDE = 32


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def picture(width: int = SIDE, height: int = SIDE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half() -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE // 2, SIDE))
    return mask


def kept(made: Image.Image, before: Image.Image, left: int = 0, top: int = 0) -> bool:
    box = (left, top, left + before.width, top + before.height)
    return made.crop(box).tobytes() == before.tobytes()


def test_defaults_name_what_there_is() -> None:
    for table in (defaults.KERNELS, defaults.STEPS, defaults.LATENT, defaults.UNDER_MASK):
        assert set(table) <= set(registry.KINDS["restoration"])
    for name, (sampler, fields) in defaults.KERNELS.items():
        registry.build("sampler", sampler, **fields)
        assert name in registry.KINDS["restoration"]
    for method, spacing in defaults.SPACINGS.items():
        assert method in registry.KINDS["restoration"]
        assert spacing in registry.KINDS["spacing"]
    for table in (defaults.LATENT, defaults.UNDER_MASK):
        for name, fields in table.items():
            known = dict(registry.entry("restoration", name).fields)
            assert set(fields) <= set(known) - set(MADE_HERE)
            assert all(str(value) != known[field] for field, value in fields.items())


@pytest.mark.parametrize("name", sorted(set(registry.KINDS["restoration"])))
def test_under_a_mask_black_is_kept_to_the_bit_by_every_method(pipe: Pipeline, name: str) -> None:
    """And white is not; each with its own kernel, its steps counted."""
    before, fields = picture(), {"repaint": {"length": 1, "times": 2}}.get(name, {})
    method = Inpainting(name, dict(fields), 0.1)
    whole = method.plan(pipe, ["a fox"], before, half(), seed=1, steps=4, guidance_scale=1)
    out = next(pipe.run(whole))
    new, old = np.asarray(out.images[0]), np.asarray(before)
    assert np.array_equal(new[:, SIDE // 2 :], old[:, SIDE // 2 :])
    assert not np.array_equal(new[:, : SIDE // 2], old[:, : SIDE // 2])
    falls = sum(b.u < a.u for a, b in zip(whole.levels, whole.levels[1:], strict=False))
    assert out.evaluations["cond"] == falls
    assert out.recorded["restoration"]["method"] == name


def test_a_method_under_a_mask_takes_the_place_of_holding_x0(pipe: Pipeline) -> None:
    """RePaint's own latents: known ones end as the picture's, bit for bit, without `Keep`."""
    whole = Inpainting("repaint", {"length": 2, "times": 3}).plan(pipe, ["a fox"], picture(), half(), seed=1, steps=6)
    assert isinstance(whole.sampler, RePaint)
    assert isinstance(whole.sampler.sampler, DDPM)
    assert whole.source is not None
    assert not whole.source.held
    flat = pipe.plan("a fox", None, picture(), half(), seed=1, steps=6)
    assert list(whole.levels) == levels.jumps(flat.levels, 2, 3)
    out = next(pipe.run(whole))
    own = Source(picture()).latents(pipe.bundle.codec, pipe.device)
    known = whole.source.latent_mask(pipe.bundle.codec.factor, pipe.device)
    assert known is not None
    inside = (known == 0).expand_as(own)
    assert torch.equal(out.latents[inside], own[inside])
    assert bool(inside.any())
    assert not bool(inside.all())


@pytest.mark.parametrize("name", ["blended", "ccdf", "ddnm_plus", "ilvr"])
def test_known_latents_end_as_the_pictures_own(pipe: Pipeline, name: str) -> None:
    """For every method that meets data exactly; the others are drawn."""
    whole = Inpainting(name).plan(pipe, ["a fox"], picture(), half(), seed=1, steps=3, guidance_scale=1)
    out, own = next(pipe.run(whole)), Source(picture()).latents(pipe.bundle.codec, pipe.device)
    assert whole.source is not None
    white = whole.source.latent_mask(pipe.bundle.codec.factor, pipe.device)
    assert white is not None
    known = (white == 0).expand_as(own)
    torch.testing.assert_close(out.latents[known], own[known])
    assert float((out.latents - own)[~known].abs().min()) > 0


def test_what_is_not_given_is_the_methods_own(pipe: Pipeline) -> None:
    plan = Restoration("pool(4)", "ddnm").plan(pipe, [""], picture(8, 8))
    assert (plan.given.sampler, plan.given.sampler_set, plan.given.steps) == ("renoise", {"eta": 0.85}, 100)
    assert plan.given.guidance_scale == 1
    assert Restoration("pool(4)", "dmps").plan(pipe, [""], picture(8, 8)).given.spacing == "leading"
    given = Restoration("pool(4)", "dps", {"scale": 2.0}).plan(pipe, ["a fox"], picture(8, 8), sampler="euler", steps=3)
    assert (given.given.sampler, given.given.steps, given.given.guidance_scale) == ("euler", 3, 3)
    assert given.recorded["restoration"]["fields"] == {"scale": 2.0}
    assert getattr(given.sampler, "scale", None) == 2
    latent = Restoration("pool(4)").plan(pipe, [""], picture(8, 8), steps=2)
    assert latent.recorded["restoration"]["fields"] == defaults.LATENT["dps"]
    sampler: Any = latent.sampler
    assert isinstance(sampler.measurement.operator, Latent)
    assert sampler.measurement.operator.steps == defaults.ROUNDS


def test_methods_with_a_codec_measure_images(pipe: Pipeline) -> None:
    for name in ("psld", "resample"):
        out = next(pipe.run(Restoration("pool(4)", name).plan(pipe, [""], picture(8, 8), steps=2, seed=1)))
        assert any("the data are missed by" in n for n in out.notices)


def test_a_truncated_walk_starts_from_the_guess(pipe: Pipeline) -> None:
    plan = Restoration("pool(4)", "truncated", {"strength": 0.5}).plan(pipe, [""], picture(8, 8), steps=6)
    assert len(plan.levels) == 4
    sampler: Any = plan.sampler
    first = plan.sampler.start(torch.zeros(1, *plan.shape), plan.levels[0])
    big = to_tensor([picture(8, 8)]).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(first, plan.levels[0].alpha * pipe.bundle.codec.encode(big))
    noisy = sampler.measurement.operator.guess(first, 0.5 * sampler.measurement.y, 0.25)
    # Every singular value of pool(4) is .25: where the deviation is .25 too, half of A+ y is left.
    torch.testing.assert_close(noisy, pipe.bundle.codec.encode(0.25 * big), rtol=1e-4, atol=1e-4)


def test_borders() -> None:
    assert borders("16") == dict.fromkeys(("left", "right", "top", "bottom"), 16)
    assert borders(" left = 3,top=0 ") == {"left": 3, "top": 0}
    for text, words in (
        ("", "form"), ("x", "form"), ("-4", "form"), ("1,2", "form"), ("left=1,left=2", "form"), ("left=", "form"),
        ("lleft=1", "did you mean 'left'"), ("0", "adds nothing"), ("left=0", "adds nothing"), ("left=999999", "form"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            borders(text)


def test_a_frame_repeats_the_edge_and_is_white() -> None:
    framed = Source.framed(picture(5, 4), left=2, bottom=3)
    assert framed.mask is not None
    assert framed.picture.size == framed.mask.size == (7, 7)
    assert kept(framed.picture, picture(5, 4), 2, 0)
    mask = np.asarray(framed.mask)
    assert np.array_equal(mask == 0, np.pad(np.ones((4, 5), bool), ((0, 3), (2, 0))))
    assert framed.fitted(14, 14).held
    assert not Source(picture(), held=False).fitted(16, 16).held
    canvas = np.asarray(framed.picture)
    assert np.array_equal(canvas[:4, 0], canvas[:4, 2])
    assert np.array_equal(canvas[6, 2:], canvas[3, 2:])


@pytest.mark.parametrize("method", ["keep", "repaint"])
def test_outpainting_keeps_the_picture_to_the_bit(pipe: Pipeline, method: str) -> None:
    whole = Inpainting(method, outpaint="left=8,bottom=16").plan(pipe, ["a fox"], picture(), None, seed=1, steps=3)
    made = next(pipe.run(whole)).images[0]
    assert made.size == (SIDE + 8, SIDE + 16)
    assert kept(made, picture(), 8, 0)
    assert np.asarray(made.crop((0, 0, 8, SIDE))).std() > 0
    with pytest.raises(UsageError, match="the picture with its border is 33x32 pixels; this model takes multiples of 4"):
        Inpainting(method, outpaint="left=1").plan(pipe, ["a fox"], picture(), None)
    with pytest.raises(UsageError, match="--width is 64, but the picture with its border is 40; leave it out"):
        Inpainting(method, outpaint="left=8").plan(pipe, ["a fox"], picture(), None, width=64)


DOORS = [
    (["--restore", "pool(4)", "--input", "small.png", "--method", "diffpir", "--set", "restore.weight=2"],
     ["--input", "small.png"]),
    (["--init-image", "in.png", "--mask", "mask.png", "--method", "repaint", "--set", "restore.times=2"],
     ["--init-image", "in.png", "--mask", "mask.png"]),
    (["--init-image", "in.png", "--outpaint", "4", "--method", "ilvr"], ["--init-image", "in.png"]),
    (["--init-image", "in.png", "--outpaint", "left=4"], ["--init-image", "in.png"]),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "pictures"), DOORS)
def test_from_the_command_line_and_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str],
    pictures: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    picture(8, 8).save("small.png")
    half().save("mask.png")
    model = ["--model", str(tiny("eps")), "--device", "cpu"]
    assert main([*model, "-p", "a fox", *flags, "--steps", "4", "-o", "out.png"]) == 0
    capsys.readouterr()
    assert main([*model, "--replay", "out.png", "--verify", *pictures]) == 0
    assert capsys.readouterr().out == "out.png: bit-equal\n"
    Image.new("RGB", Image.open(pictures[1]).size).save(pictures[1])
    assert main([*model, "--replay", "out.png", "--verify", *pictures]) == 2
    assert "is not the picture that the image was made from" in capsys.readouterr().err
    assert main([*model, "--replay", "out.png", "--verify"]) == 2
    assert "is needed" in capsys.readouterr().err
