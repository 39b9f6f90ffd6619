"""Textual inversion and DreamBooth: what learns, what stays to the bit, and what the exports give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import Pipeline, UsageError, adapted, load
from train import recipe
from train.__main__ import main
from train.adapter_files import DIFFUSERS as PEFT
from train.loop import run
from train.tasks.dreambooth import Dreambooth
from train.tasks.textual_inversion import A1111, DIFFUSERS, TextualInversion


@pytest.fixture(scope="module")
def photos(pictures: Callable[..., Path]) -> Path:
    """Four pictures without captions."""
    return pictures()


@pytest.fixture
def make(photos: Path, tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    def task(kind: type, **fields: Any) -> Any:
        table = {"path": str(photos), "cache": str(tmp_path / "cache"), "buckets": False, **fields.pop("data", {})}
        usual: dict[type, dict[str, Any]] = {
            TextualInversion: {"word": "<toy>", "begin": "fox", "templates": ("a {} on red", "the {}")},
            Dreambooth: {"instance": "a fox on red", "prior": "a fox", "prior_images": 3},
        }
        return kind(table, str(tiny("eps")), **{**usual[kind], **fields})

    return task


# --- textual inversion


def test_only_the_new_rows_move_and_the_files_give_them_back(make: Any, tiny: Any, tmp_path: Path, taught: Any) -> None:
    task = make(TextualInversion, vectors=2).grouped(2)
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    before = task.bundle.text(["a <toy> on red"]).tokens
    table = plain.bundle.text.encoder.embeddings.token_embedding.weight
    fox = int(plain.bundle.text.tokenizer(["fox"], 8)[0][1])
    net = task.net()
    assert [n for n, _ in net.named_parameters()] == ["branches.word.rows"]
    assert torch.equal(net.branches["word"].rows, table[[fox, fox]])
    assert torch.equal(task.bundle.text(["a <toy> on red"]).tokens, before)
    net = taught(task)
    rows = net.branches["word"].rows.detach()
    assert float((rows - table[fox]).abs().min(dim=1).values.min()) > 0
    held = task.bundle.text.encoder.embeddings.token_embedding.weight
    assert torch.equal(held[: len(table)], table)
    assert torch.equal(held[len(table) :], table[[fox, fox]])
    assert all(torch.equal(a, b) for a, b in zip(task.bundle.model.parameters(), plain.bundle.model.parameters(), strict=True))
    task.export(net, tmp_path)
    for text in (f"{tmp_path / A1111}:<toy>", str(tmp_path / DIFFUSERS)):
        mine = adapted(plain, embeddings=[text])
        assert torch.allclose(
            mine.bundle.text(["a <toy> on red"]).tokens, task.bundle.text(["a <toy> on red"]).tokens, atol=1e-6
        )
        assert not torch.allclose(mine.bundle.text(["a <toy> on red"]).tokens, before, atol=1e-3)


def test_a_word_resumes_to_the_bit_and_says_what_is_wrong(make: Any, tmp_path: Path, seen: Any, job: Any) -> None:
    straight = run(make(TextualInversion), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(TextualInversion), job(tmp_path / "b", stop=stop))
    assert (straight / A1111).read_bytes() == (again / A1111).read_bytes()
    said = {make(TextualInversion).said(0, s) for s in (make(TextualInversion).dataset.seen(0, i) for i in range(12))}
    assert said == {"a <toy> on red", "the <toy>"}
    for fields, words in (({"begin": "two foxes"}, "one token"), ({"word": "fox"}, "is a token of the model already")):
        with pytest.raises(UsageError, match=words):
            make(TextualInversion, **fields).net()
    for fields, words in (
        ({"vectors": 0}, "1 to 75"),
        ({"templates": ("a photo",)}, "where the word stands"),
        ({"train_network": True}, "word alone"),
    ):
        with pytest.raises(UsageError, match=words):
            make(TextualInversion, **fields)


# --- DreamBooth


def test_the_loss_is_the_subjects_plus_the_priors(make: Any) -> None:
    def loss(task: Any, **batch: Any) -> Tensor:
        torch.manual_seed(0)
        task = task.grouped(2)
        return task.net()(task.batch(0, range(2)))["loss"].detach()

    both = make(Dreambooth).grouped(2)
    own = loss(make(Dreambooth, prior=""))
    assert torch.allclose(loss(make(Dreambooth, prior_weight=0.0)), own, rtol=1e-5)
    net = both.net()
    prior = net(both._prior.batch(1, range(2)))["loss"].detach()
    assert torch.allclose(loss(make(Dreambooth, prior_weight=0.7)), own + 0.7 * prior, rtol=1e-5)
    assert not torch.allclose(own, prior, rtol=1e-2)


def test_the_prior_is_drawn_once_by_the_model_itself(make: Any, tiny: Any, tmp_path: Path, job: Any) -> None:
    task = make(Dreambooth)
    task.net()
    folder = next((tmp_path / "cache").glob("prior-*"))
    files = sorted(folder.glob("*.png"))
    assert len(files) == 3
    mine = Pipeline(load(tiny("eps")))("a fox", seed=2).images[0]
    assert np.abs(np.asarray(mine, int) - np.asarray(Image.open(files[2]), int)).max() <= 1
    stamps = [f.stat().st_mtime_ns for f in files]
    run(make(Dreambooth), job(tmp_path / "run"))
    assert [f.stat().st_mtime_ns for f in files] == stamps
    assert len(list((tmp_path / "cache").glob("prior-*"))) == 1
    make(Dreambooth, prior_images=2).net()
    assert len(list((tmp_path / "cache").glob("prior-*"))) == 2


def test_a_prior_of_several_prompts_is_drawn_and_trained_with_each(make: Any, tiny: Any, tmp_path: Path) -> None:
    prompts = ("a fox", "an owl, two cats")
    task = make(Dreambooth, prior=("a fox", " an  owl, two cats\n"), data={"dropout": 1.0}).grouped(3)
    task.net()
    folder = next((tmp_path / "cache").glob("prior-*"))
    assert [(folder / f"{k:04}.txt").read_text() for k in range(3)] == [prompts[0], prompts[1], prompts[0]]
    mine = Pipeline(load(tiny("eps")))(prompts[1], seed=1).images[0]
    assert np.abs(np.asarray(mine, int) - np.asarray(Image.open(folder / "0001.png"), int)).max() <= 1
    batch = task._prior.batch(0, range(3))
    told = [prompts[int(Path(n).stem) % 2] for n in batch["names"]]
    assert set(told) == set(prompts)
    assert torch.equal(batch["text_tokens"], task._prior.precomputed.text(told)["tokens"])
    for prior, words in ((("a fox", " "), "holds an empty prompt"), (("a", "b", "c", "d"), "1 or more for every prompt")):
        with pytest.raises(UsageError, match=words):
            make(Dreambooth, prior=prior)


@pytest.mark.parametrize("full", [False, True])
def test_it_resumes_to_the_bit_and_exports_branches_or_all(make: Any, tiny: Any, tmp_path: Path, full: bool, job: Any) -> None:
    straight = run(make(Dreambooth, full=full), job(tmp_path / "a"))
    for stop in (3, 0):
        again = run(make(Dreambooth, full=full), job(tmp_path / "b", stop=stop))
    name = "unet/diffusion_pytorch_model.safetensors" if full else PEFT
    assert (straight / name).read_bytes() == (again / name).read_bytes()
    pipe = Pipeline.from_pretrained(str(straight if full else tiny("eps")), "cpu", "fp32", "sdpa")
    assert (pipe if full else adapted(pipe, [str(straight / name)]))("a fox", seed=1, steps=2).images


# --- recipes


def test_a_setting_may_be_a_list_as_the_recipe_writes_it() -> None:
    for text, wanted in (
        ('["a cat", "a dog"]', ["a cat", "a dog"]), ("[1, 2.5]", [1, 2.5]), ("[a cat:a dog:0.5]", "[a cat:a dog:0.5]"),
        ("a [cat]", "a [cat]"), ("[", "["),
    ):  # fmt: skip
        assert recipe.read("configs/dreambooth.toml", [f"task.prior={text}"])["task"]["prior"] == wanted
    task = recipe.build(recipe.read("configs/dreambooth.toml", ['task.prior=["a cat", "a dog"]']), "x")[0]
    assert task.prior == ("a cat", "a dog")
    with pytest.raises(UsageError, match="it takes text"):
        recipe.build(recipe.read("configs/dreambooth.toml", ['task.instance=["a cat"]']), "x")


@pytest.mark.parametrize("name", ["textual_inversion", "dreambooth", "custom_diffusion"])
def test_the_recipes_run_from_the_command_line(name: str, photos: Path, tiny: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--config", f"configs/{name}.toml", "--set", f"data.path={photos}", "--set", f"task.model={tiny('v')}"]
    words += ["--set", f"data.cache={tmp_path / 'cache'}", "--set", f"job.output={tmp_path / 'run'}"]
    words += ["--set", "job.steps=2", "--set", "job.batch=2"]
    words += [] if name == "textual_inversion" else ["--set", "task.prior_images=2"]
    words += [] if name == "dreambooth" else ["--set", "task.begin=fox"]
    assert main(["check", *words]) == 0, capsys.readouterr().out
    assert main(words) == 0, capsys.readouterr().err
    assert list((tmp_path / "run" / "export").glob("*.safetensors"))
