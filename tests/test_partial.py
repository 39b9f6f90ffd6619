"""--allow-partial: what a file lacks is drawn, always alike, and said; what is broken stays an error."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_pipe import ModelError, Pipeline, cli, load, lora, recipe, weights
from ldm_pipe.doors.adapters import Adapters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
tiny_families = importlib.import_module("tiny_families")
FILE = "diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]


def damage(folder: Path, change: Callable[[Tensors], None], part: str = "unet") -> None:
    held = load_file(folder / part / FILE)
    change(held)
    save_file(held, folder / part / FILE)


def incomplete(t: Tensors) -> None:
    del t["conv_in.weight"], t["conv_norm_out.weight"], t["time_embedding.linear_1.bias"]
    t["conv_in.bias"] = torch.zeros(3)
    t["evil"] = torch.ones(1)


@pytest.fixture
def copy(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("eps"), tmp_path / "model"))


def test_the_rest_is_the_file_and_what_is_missing_is_drawn(copy: Path) -> None:
    before = load(copy).model.network.unet.state_dict()  # type: ignore[union-attr]
    damage(copy, incomplete)
    with pytest.raises(ModelError, match=r"missing tensor 'conv_in.weight' and 2 more"):
        load(copy)
    one, two = (load(copy, allow_partial=True) for _ in range(2))
    assert (
        one.notes
        == two.notes
        == (
            "model/unet: missing tensor 'conv_in.weight' and 2 more",
            "model/unet: unexpected tensor 'evil' and 0 more",
            "model/unet: mismatched tensor 'conv_in.bias' and 0 more",
        )
    )
    found, again = (b.model.network.unet.state_dict() for b in (one, two))  # type: ignore[union-attr]
    drawn = {"conv_in.weight", "conv_norm_out.weight", "time_embedding.linear_1.bias", "conv_in.bias"}
    assert all(torch.equal(t, again[n]) for n, t in found.items())
    assert {n for n, t in found.items() if not torch.equal(t, before[n])} <= drawn
    assert 0.5 < found["conv_in.weight"].abs().max() * (4 * 9) ** 0.5 <= 1
    assert not torch.equal(weights.drawn("a.weight", (4, 4)), weights.drawn("b.weight", (4, 4)))  # each its own
    assert found["conv_norm_out.weight"].eq(1).all()
    assert found["conv_in.bias"].eq(0).all()
    assert torch.isfinite(Pipeline(one)("a fox", seed=1, steps=2).latents).all()
    assert load(copy.parent / "model", allow_partial=True).notes  # a second look says it again


def test_a_network_of_diffusers_is_drawn_too(tmp_path: Path) -> None:
    folder = tiny_families.save("dit", tmp_path / "m")

    def change(t: Tensors) -> None:
        del t["transformer_blocks.0.attn1.to_q.weight"]
        t["proj_out_2.bias"] = torch.zeros(3)
        t["evil"] = torch.ones(1)

    damage(folder, change, "transformer")
    with pytest.raises(ModelError):
        load(folder)
    one, two = (load(folder, allow_partial=True) for _ in range(2))
    assert sorted(note.split(":")[1].split()[0] for note in one.notes) == ["mismatched", "missing", "unexpected"]
    assert "'transformer_blocks.0.attn1.to_q.weight' and 0 more" in " ".join(one.notes)
    found, again = (b.model.network.transformer.state_dict() for b in (one, two))  # type: ignore[union-attr]
    assert all(torch.equal(t, again[n]) and torch.isfinite(t).all() and not t.is_meta for n, t in found.items())
    assert found["transformer_blocks.0.attn1.to_q.weight"].std() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"conv_in.weight": t["conv_in.weight"] / 0}), "NaN or Inf in tensor 'conv_in.weight'"),
        (lambda t: t.update({"conv_in.weight": t["conv_in.weight"].int()}), "not floating point"),
    ],
)
def test_what_is_broken_stays_an_error(copy: Path, change: Callable[[Tensors], None], words: str) -> None:
    damage(copy, change)
    with pytest.raises(ModelError, match=words):
        load(copy, allow_partial=True)
    (copy / "unet" / FILE).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors is read"):
        load(copy, allow_partial=True)


def test_the_flag_says_what_was_missing(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(copy, incomplete)
    rest = ["--model", str(copy), "-p", "a fox", "--seed", "1", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert cli.main(rest) == 2
    assert "missing tensor" in capsys.readouterr().err
    assert cli.main([*rest, "--allow-partial"]) == 0
    assert "note: model/unet: missing tensor 'conv_in.weight' and 2 more" in capsys.readouterr().err
    assert cli.main(["--model", str(copy), "--check", "--allow-partial"]) == 0
    said = capsys.readouterr().out
    assert "loaded with warnings" in said
    assert "warning: model/unet: unexpected tensor 'evil'" in said


def test_the_recipe_tells_of_it(
    copy: Path, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many tensors and the first names: --show, --replay and --verify say them; the same load gives the same image."""

    def lose(t: Tensors) -> None:
        incomplete(t)
        del t["time_embedding.linear_2.bias"]

    damage(copy, lose)
    image, there = tmp_path / "a.png", ["--model", str(copy), "--device", "cpu"]
    assert cli.main([*there, "-p", "a fox", "--seed", "1", "--steps", "2", "-o", str(image), "--allow-partial"]) == 0
    made = recipe.read(image)
    names = ["conv_in.weight", "conv_norm_out.weight", "time_embedding.linear_1.bias"]
    assert made.partial[0] == {"part": "model/unet", "fault": "missing", "count": 4, "first": names}
    assert [row["fault"] for row in made.partial] == ["missing", "unexpected", "mismatched"]
    lacking = "4 missing in model/unet (conv_in.weight, conv_norm_out.weight, time_embedding.linear_1.bias, ...)"
    assert made.lacking() == f"{lacking}; 1 unexpected in model/unet (evil); 1 mismatched in model/unet (conv_in.bias)"
    capsys.readouterr()
    assert cli.main(["--show", str(image)]) == 0
    assert f"partial load:    {lacking}" in capsys.readouterr().out
    again = ["--replay", str(image), "--verify", *there]
    assert cli.main([*again, "--allow-partial"]) == 0
    out, said = capsys.readouterr()
    assert out.endswith(": bit-equal\n")
    assert f"note: the image was made by a model whose tensors did not all fit, under --allow-partial: {lacking}" in said
    assert cli.main(again) == 2
    said = capsys.readouterr().err
    assert "under --allow-partial" in said  # beside the refusal
    assert "missing tensor 'conv_in.weight'" in said
    whole = ["--replay", str(image), "--verify", "--model", str(tiny("eps")), "--device", "cpu"]
    assert cli.main(whole) == 1
    assert "tensors that did not fit: 4 missing (conv_in.weight, " in capsys.readouterr().out


@pytest.mark.parametrize("row", [{}, {"first": 3, "count": []}, {"first": ["a" * 999], "fault": {}, "count": 10**99}])
def test_a_foreign_recipe_may_hold_anything_there(row: dict[str, Any]) -> None:
    assert len(recipe.Recipe("a fox", 1, partial=(row,)).lacking()) < 300
    assert recipe.Recipe("a fox", 1).lacking() == ""
    assert "partial" not in recipe.Recipe("a fox", 1).summary()


def test_a_lora_that_fits_in_part(copy: Path, tmp_path: Path) -> None:
    bundle, file = load(copy), tmp_path / "a.safetensors"
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fits = {f"unet.{layer}.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 16)), ("B", (16, 2)))}
    alone = {f"unet.elsewhere.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, 16)), ("B", (16, 2)))}
    save_file(fits | alone, file)
    with pytest.raises(ModelError, match="and 1 more find no layer"):
        lora.merge(bundle, file)
    _, said = lora.merge(bundle, file, partial=True)
    assert said.startswith("a.safetensors: 2 of 4 tensors matched, 'unet.elsewhere.lora_A.weight' is the first without a layer")
    save_file(alone, file)
    with pytest.raises(ModelError, match="find no layer"):  # nothing of it fits: that is another model's
        Adapters(((str(file), 1.0),), partial=True).applied(Pipeline(bundle))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_are_converted_as_they_are_read(copy: Path, kind: torch.dtype) -> None:
    """The same bits as converting afterwards; the codec stays in fp32, which it may have to work in."""
    asked = list[bool]()
    found = load(copy, kind=lambda wide: asked.append(wide) or kind)
    whole = load(copy)
    assert asked == [False]
    assert {p.dtype for p in (*found.model.parameters(), *found.text.encoder.parameters())} == {kind}  # type: ignore[attr-defined]
    assert {p.dtype for p in found.codec.vae.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    theirs = whole.model.to(kind).state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in found.model.state_dict().items())
    assert not weights.wide([copy / "unet" / FILE])
    save_file({"x": torch.zeros(256, 1, 1, 1)}, copy / "wide.safetensors")
    assert weights.wide([copy / "wide.safetensors"])
