"""Every family: a tiny checkpoint of the real classes gives the latents that diffusers' own pipeline gives."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_pipe import ModelError, Pipeline, UsageError, load
from ldm_pipe.families import FAMILIES, family_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
families, tiny_families = importlib.import_module("families"), importlib.import_module("tiny_families")
CASES = [(name, sampler) for name in tiny_families.MADE for sampler in families.samplers(name)]
Saved = Callable[[str], Path]


@pytest.mark.parametrize(("name", "sampler"), CASES)
def test_the_finished_latents_equal_diffusers(saved: Saved, name: str, sampler: str) -> None:
    """Same folder, prompts, start and steps, guidance included: 1e-4 of the largest value in fp32."""
    found, expected = families.both(name, saved(name), sampler)
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def run(pipe: Pipeline, prompt: str, **settings: Any) -> Any:
    given = {"seed": 3, "steps": 2, "height": 32, "width": 32} | families.PICTURES.get(pipe.bundle.name.split("/")[-2], {})
    return pipe(prompt, **(given | settings))


@pytest.mark.parametrize("name", tiny_families.MADE)
def test_prompts_and_guidance_show(saved: Saved, name: str) -> None:
    """With the folder's own defaults: images differ by prompt, by negative prompt and by scale, and are finite."""
    pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32")
    pictures = families.PICTURES.get(name, {})
    one, other = ("7", "dog") if name == "dit" else ("a fox", "blue cat")
    out = {p: run(pipe, p, **pictures).latents for p in (one, other)}
    scales = [run(pipe, one, guidance_scale=s, **pictures).latents for s in (1.5, 6.0)]
    assert (out[one] - out[other]).abs().max() > 1e-3
    assert (scales[0] - scales[1]).abs().max() > 1e-3
    told = name in ("sd lcm", "flux dev")  # one branch, however strong the guidance
    assert pipe.bundle.embeds == told
    assert set(run(pipe, one, **pictures).evaluations) == (
        {"cond"}
        if told or name == "flux schnell"
        else {"cond", "image", "uncond"}
        if name == "sd pix2pix"
        else {"cond", "uncond"}
    )


def test_every_family_has_a_checkpoint_here(saved: Saved) -> None:
    """And the index alone tells which it is."""
    found = {family_of(json.loads((saved(n) / "model_index.json").read_text()), n) for n in tiny_families.MADE}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sdxl refiner", "sd3", "sd3 without T5", "flux dev", "pixart alpha", "sana"])
def test_every_family_takes_the_grammar_of_prompts(saved: Saved, name: str) -> None:
    """Weights, chunks, schedules and AND in one prompt; without any sign, the bits are those of plain text."""
    pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32")
    prompt = "a (fox:1.4) BREAK [blue|red] AND a [cat:low:0.5] background :0.5"
    found = run(pipe, prompt, negative_prompt="(low:1.2) quality")
    assert torch.isfinite(found.latents).all()
    assert found.evaluations == {"cond": 2, "and:1": 2, "uncond": 2}
    assert not torch.equal(found.latents, run(pipe, prompt.replace("1.4", "1"), negative_prompt="(low:1.2) quality").latents)
    assert torch.equal(run(pipe, "a fox").latents, run(pipe, "a fox", plain_prompt=True).latents)


def test_rows_of_a_batch_are_told_their_own_condition(saved: Saved) -> None:
    """Two prompts together and one by one: pooled vectors, masks, labels and sizes go to the right rows."""
    for name in ("sdxl", "sd3", "pixart alpha", "sana", "dit", "flux dev"):
        pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32")
        prompts = ["7", "golden retriever"] if name == "dit" else ["a fox", "the blue cat on red"]
        together = run(pipe, prompts, seed=None, seeds=(3, 4)).latents  # type: ignore[arg-type]
        for row, prompt in enumerate(prompts):
            alone = run(pipe, prompt, seed=3 + row).latents[0]
            assert (together[row] - alone).abs().max() < 1e-3 * alone.abs().max(), name


def test_sizes_are_conditions(saved: Saved) -> None:
    """SDXL is told the size of the picture, unless it is told another; so is PixArt-alpha."""
    bundle = load(saved("sdxl"))
    cond, x, time = bundle.text(["a fox"]), torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        usual, same, other = (
            bundle.model.network(x, time, type(cond)(tokens=cond.tokens, pooled=cond.pooled, extras=extras))
            for extras in ({}, {"sizes": sizes}, {"sizes": sizes * 2})
        )
    assert torch.equal(usual, same)
    assert (usual - other).abs().max() > 1e-3


def test_a_negative_prompt_that_is_empty_may_be_no_condition_at_all(saved: Saved) -> None:
    text: Any = load(saved("sdxl")).text
    assert text.zeros
    assert text.negative(["", "a fox"]).tokens.abs().amax((1, 2)).gt(0).tolist() == [False, True]
    assert text.negative(["", "a fox"]).pooled.abs().amax(1).gt(0).tolist() == [False, True]
    assert (text([""]).tokens.abs() > 0).any()


def test_classes_are_numbers_names_or_refused(saved: Saved) -> None:
    text: Any = load(saved("dit")).text
    assert text(["7", "cock", " Dog ", ""]).extras["label"].tolist() == [7, 7, 207, 1000]
    for wrong in ("1000", "-1", "a fox", "\N{ARABIC-INDIC DIGIT SEVEN}"):
        with pytest.raises(UsageError, match="not a class of this model, which takes 0 to 999"):
            text([wrong])
    with pytest.raises(UsageError, match="did you mean 'golden retriever'"):
        text(["golden retriver"])


def test_sides_that_the_network_cannot_cut_up_are_refused(saved: Saved) -> None:
    """Factor 4 and patches of 2: multiples of 8."""
    for name, wanted in (("sd3", 8), ("flux dev", 8), ("pixart sigma", 8), ("sdxl", 4)):
        pipe = Pipeline.from_pretrained(str(saved(name)), "cpu", "fp32")
        assert pipe.bundle.multiple == wanted
        with pytest.raises(UsageError, match=f"multiple of {wanted}"):
            pipe.plan("a fox", width=32 + wanted // 2, height=32)


def test_the_shift_of_flux_grows_with_the_area(saved: Saved) -> None:
    """exp(0.5) at 256 patches, exp(1.15) at 4096; a spacing that is named gets none of it."""
    pipe = Pipeline.from_pretrained(str(saved("flux dev")), "cpu", "fp32")
    shifts = [pipe.plan("x", width=8 * s, height=8 * s).given.spacing_set["shift"] for s in (16, 64)]
    assert shifts == pytest.approx([1.6487213, 3.1581929])
    assert pipe.plan("x", width=128, height=128, spacing="trailing").given.spacing_set == {}
    given = pipe.plan("x", width=128, height=128, spacing_set={"shift": 2.0}).given.spacing_set
    assert given == {"base": "trailing", "shift": 2.0}


def test_an_editing_model_needs_a_picture(saved: Saved) -> None:
    pipe = Pipeline.from_pretrained(str(saved("sd pix2pix")), "cpu", "fp32")
    with pytest.raises(UsageError, match="--init-image"):
        pipe("a fox", steps=2, height=32, width=32)
    pipe = Pipeline.from_pretrained(str(saved("sd inpainting")), "cpu", "fp32")
    assert torch.isfinite(pipe("a fox", steps=2, height=32, width=32).latents).all()


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "a part too few": ("sd3", lambda i: i.pop("text_encoder_2"), r"text_encoder_2 is None; it takes .*Stable Diffusion 3"),
    "another codec": ("sana", lambda i: i.update(vae=["diffusers", "AutoencoderKL"]), "vae is .*AutoencoderDC"),
    "another library": ("flux dev", lambda i: i.update(tokenizer_2=["os", "system"]), "tokenizer_2 is .*'os', 'system'"),
    "a network of code": ("pixart sigma", lambda i: i.update(transformer=["m.py", "Net"]), "transformer is"),
    "three names": ("dit", lambda i: i.update(vae=["diffusers", "models", "AutoencoderKL"]), "vae is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_class_outside_the_table_is_refused(saved: Saved, tmp_path: Path, fault: str) -> None:
    name, change, words = FAULTS[fault]
    index = json.loads((saved(name) / "model_index.json").read_text())
    change(index)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_networks_that_only_their_library_knows_are_read_as_strictly(saved: Saved, tmp_path: Path) -> None:
    """Missing, extra, wrongly shaped, not finite; more parameters than the file holds; layers without number; quantised."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(saved("sd3"), tmp_path / "m"))
    file, config = folder / "transformer" / "diffusion_pytorch_model.safetensors", folder / "transformer" / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    name = "transformer_blocks.0.attn.to_q.weight"
    for change, words in (
        ({name: None}, f"missing tensor '{name}' and 0 more"),
        ({"evil": torch.zeros(1)}, "unexpected tensor 'evil'"),
        ({name: torch.zeros(3, 3)}, "transformer"),
        ({name: tensors[name] / 0}, f"NaN or Inf in tensor '{name}'"),
        ({name: tensors[name].int()}, "not floating point: tensor"),
    ):
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, file)
        with pytest.raises(ModelError, match=words):
            load(folder)
    save_file(tensors, file)
    for said, words in (
        ({"joint_attention_dim": 900_000}, "parameters, the files hold"),
        ({"num_layers": 5000}, "5000 num_layers"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"num_layers": "2"}, "transformer cannot be loaded"),
    ):
        config.write_text(json.dumps(settings | said))
        with pytest.raises(ModelError, match=words):
            load(folder)
