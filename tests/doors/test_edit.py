"""`--edit`: a picture and its edit, from a seed or from a given picture, and both again from their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_pipe import CLEAN, Cond, Pipeline, UsageError, image, registry
from ldm_pipe.cli import main
from ldm_pipe.doors.edit import Edit
from ldm_pipe.plan import taken

FOX, CAT = "a fox on a blue background", "a cat on a blue background"
TEXT = f"{FOX} -> {CAT}"
FAST = {"null_text": {"inner": 1}}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("builtin", "cpu", "fp32")


@pytest.fixture(scope="module")
def fox(pipe: Pipeline) -> Image.Image:
    return pipe(FOX, seed=3, steps=8).images[0]


def test_an_edit_is_drawn_beside_its_source_and_both_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--seed", "7", "--steps", "4", "--num-images", "2", "--dtype", "fp32", "--quiet"]
    assert main(["--edit", TEXT, "--set", "edit.own=0.5", *flags, "-o", "edited"]) == 0
    names = [f"edited/a-{what}-on-a-blue-background-{seed}.png" for what in ("fox", "cat") for seed in (7, 8)]
    assert capsys.readouterr().out.splitlines() == names
    assert main(["-p", "a fox on a blue background", *flags, "-o", "plain"]) == 0
    capsys.readouterr()
    assert Path(names[0]).read_bytes()[-2000:] == Path(names[0].replace("edited", "plain")).read_bytes()[-2000:]
    for name in names[1:3]:
        assert main(["--replay", name, "--verify"]) == 0
        assert capsys.readouterr().out == f"{name}: bit-equal\n"
    assert main(["--show", names[2]]) == 0
    assert "edit:            a fox on a blue background -> a cat on a blue background" in capsys.readouterr().out


@pytest.mark.parametrize("inversion", ["null_text", "dpm_encoder"])
def test_a_given_picture_is_edited_reported_and_replayed(
    inversion: str, fox: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fox.save("fox.png")
    Image.new("RGB", fox.size).save("other.png")
    flags = ["--edit", TEXT, "--input", "fox.png", "--set", f"edit.inversion={inversion}", "--steps", "4", "--seed", "1"]
    flags += [part for name, value in FAST.get(inversion, {}).items() for part in ("--set", f"inversion.{name}={value}")]
    assert main([*flags, "--dtype", "fp32", "-o", "out"]) == 0
    said = capsys.readouterr()
    names = [f"out/a-{what}-on-a-blue-background-1.png" for what in ("fox", "cat")]
    assert said.out.splitlines() == names
    assert f"inversion {inversion} makes the picture's latents again to 0." in said.err
    assert "the codec's own round trip misses the picture by 0." in said.err
    assert ", 4 of 4 steps, " in said.err
    for name in names:
        assert main(["--replay", name, "--verify", "--input", "fox.png"]) == 0
        assert capsys.readouterr().out == f"{name}: bit-equal\n"
    for given, words in (([], "--input is needed"), (["--input", "other.png"], "--input is not the picture")):
        assert main(["--replay", names[1], "--verify", *given]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(registry.KINDS["inversion"]))
def test_every_inversion_makes_the_source_row_what_its_report_says(name: str, pipe: Pipeline, fox: Image.Image) -> None:
    """And the run's source row is untouched by the edit: alone, under no method, it has the same latents."""
    edit = Edit(FOX, CAT, inversion=name, inversion_fields=FAST.get(name, {}))
    out = edit(pipe, fox, steps=5, seed=2)
    own = pipe.bundle.codec.encode(image.to_tensor([fox]))
    missed = float((out.latents[:1] - own).square().mean().sqrt())
    said = next(n for n in out.notices if n.startswith("inversion"))
    assert f"again to {missed:.4f} rms" in said
    bound = {"dpm_encoder": 1e-5, "negative_prompt": 0.3, "fixed_point": 0.5, "null_text": 0.6, "plain": 3.0}
    assert missed < bound[name]
    assert not torch.allclose(out.latents[1], out.latents[0], atol=1e-2)


def test_an_edit_of_a_prompt_to_itself_is_the_picture(pipe: Pipeline, fox: Image.Image) -> None:
    for name in ("negative_prompt", "null_text", "dpm_encoder"):
        out = Edit(FOX, FOX, inversion=name, inversion_fields=FAST.get(name, {}))(pipe, fox, steps=4, seed=2)
        torch.testing.assert_close(out.latents[1], out.latents[0], rtol=0, atol=1e-3)


def test_a_mask_keeps_the_rest_to_the_bit_and_strength_shortens_the_walk(pipe: Pipeline, fox: Image.Image) -> None:
    mask = Image.new("L", fox.size)
    mask.paste(255, (0, 0, 32, 64))
    out = Edit(FOX, CAT, inversion="plain")(pipe, fox, mask, steps=5, strength=0.6)
    assert out.walked == 3
    assert out.evaluations["cond"] == 2 * 3
    old, new = np.asarray(fox), np.asarray(out.images[1])
    assert np.array_equal(new[:, 32:], old[:, 32:])
    assert not np.array_equal(new[:, :32], old[:, :32])


def test_smaller_batches_take_their_own_starts_noises_and_conditions(pipe: Pipeline, fox: Image.Image) -> None:
    for name, count in (("dpm_encoder", 2), ("null_text", 1)):
        plan = Edit(FOX, CAT, "prompt_to_prompt", {}, name, FAST.get(name, {})).plan(
            pipe, fox, steps=3, seed=4, num_images=count
        )
        plan = replace(plan, guides=())  # of the method, which wants its pairs whole
        whole = next(pipe.run(plan)).latents
        assert not torch.allclose(whole[-1], whole[0], atol=1e-2)
        for row in range(2 * count):
            torch.testing.assert_close(next(pipe.run(plan.batch(row, 1))).latents, whole[row : row + 1], rtol=0, atol=1e-3)


def test_rows_of_a_condition_are_taken_at_every_level() -> None:
    whole = Cond(tokens=torch.arange(4.0).reshape(4, 1, 1))
    for cond in (whole, lambda level: whole):
        part: Any = taken(cond, [3, 1])
        part = part if isinstance(part, Cond) else part(CLEAN)
        assert part.tokens.flatten().tolist() == [3, 1]


def test_what_the_inversion_needs_is_chosen_and_recorded(pipe: Pipeline, fox: Image.Image) -> None:
    """The model's own sampler keeps a memory: ddim stands in unless the user names one, which is then refused by name."""
    plan = Edit(FOX, CAT, inversion="dpm_encoder").plan(pipe, fox, steps=2)
    assert (plan.given.sampler, plan.given.sampler_set, plan.given.strength) == ("ddim", {"eta": 1.0}, 1.0)
    assert plan.recorded["sources"].keys() == {"input"}
    with pytest.raises(UsageError, match="keeps a memory"):
        Edit(FOX, CAT, inversion="plain").plan(pipe, fox, steps=2, sampler="dpm2m")
    with pytest.raises(UsageError, match="leave --negative-prompt out"):
        Edit(FOX, CAT, inversion="negative_prompt").plan(pipe, fox, steps=2, negative_prompt="a dog")


@pytest.mark.parametrize(
    ("text", "fields", "words"),
    [
        ("a fox", {}, "not of the form"), ("-> a fox", {}, "not of the form"), ("a ->", {}, "not of the form"),
        (TEXT, {"cross": "2"}, "take 0 to 1"), (TEXT, {"crosss": "1"}, "did you mean 'cross'"),
        (TEXT, {"source": "x"}, "stand in --edit"), (TEXT, {"inversion": "null_txt"}, "did you mean 'null_text'"),
    ],
)  # fmt: skip
def test_a_wrong_edit_is_one_sentence(text: str, fields: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Edit.of(text, fields).check()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--edit", TEXT, "--input", "x.png", "--num-images", "2"], "the same image for every seed"),
        (["--edit", TEXT, "--mask", "x.png"], "go with --init-image FILE, or with --edit and --input FILE"),
        (["--edit", TEXT, "--restore", "pool(4)", "--input", "x.png"], "exclude each other"),
        (["--edit", TEXT, "--method", "prompt_to_promp"], "did you mean 'prompt_to_prompt'"),
        (["--edit", TEXT, "--set", "inversion.corections=3"], "did you mean 'corrections'"),
        (["-p", "a fox", "--method", "dps"], "--method goes with --edit, --restore, --mask or --outpaint"),
        (["-p", "a fox", "--set", "inversion.inner=3"], "go with --edit"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert words in capsys.readouterr().err
