"""Custom Diffusion: keys, values and words learn, one or several together, and what the export gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm_pipe import Pipeline, UsageError, adapted
from train.job import Job
from train.tasks.custom_diffusion import DIFFERENCES, CustomDiffusion
from train.tasks.textual_inversion import A1111


@pytest.fixture
def make(pictures: Callable[..., Path], tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., CustomDiffusion]:
    def task(**fields: Any) -> CustomDiffusion:
        path = fields.pop("path", None) or pictures()
        data = {"path": str(path), "cache": str(tmp_path / "cache"), "buckets": False, "dropout": fields.pop("dropout", 0.1)}
        usual = {"instance": "a <toy> fox", "word": "<toy>", "begin": "cat", "prior": "a fox", "prior_images": 3}
        return CustomDiffusion(data, str(tiny("eps")), **{**usual, **fields})

    return task


def test_keys_values_and_the_word_learn_and_nothing_else(make: Any, tiny: Any, tmp_path: Path, seen: Any, taught: Any) -> None:
    task = make().grouped(2)
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    net = task.net()
    assert torch.equal(seen(task.bundle.model), seen(plain.bundle.model))
    names = {n.replace("-", ".") for n in net.branches} - {"word"}
    crossed = {n for n, _ in plain.bundle.model.network.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))}
    assert names == crossed
    net = taught(task)
    task.export(net, tmp_path)
    held = load_file(tmp_path / DIFFERENCES)
    assert len(held) == len(crossed)
    assert all(float(t.abs().max()) > 0 for t in held.values())
    mine = adapted(plain, [str(tmp_path / DIFFERENCES)], [f"{tmp_path / A1111}:<toy>"])
    assert torch.allclose(seen(mine.bundle.model), seen(task.bundle.model), atol=1e-5)
    assert torch.allclose(mine.bundle.text(["a <toy>"]).tokens, task.bundle.text(["a <toy>"]).tokens, atol=1e-6)


def test_several_words_learn_together(make: Any, tiny: Any, tmp_path: Path, seen: Any, pictures: Any, taught: Any) -> None:
    """Of pictures that tell of them, one file of differences and a file for each word."""
    plain, told = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa"), pictures()
    for k, picture in enumerate(sorted(told.glob("*.png"))):
        picture.with_suffix(".txt").write_text("a <toy> on red" if k % 2 else "a <pet> beside a <toy>")
    words = {"word": ("<toy>", "<pet>"), "begin": ("cat", "fox")}
    task = make(**words, path=told).grouped(2)
    never = make(**words, path=told, dropout=1.0)
    assert {never.said(0, never.dataset.seen(0, i)) for i in range(8)} == {""}, "no word is told of in place of another"
    net = taught(task)
    task.export(net, tmp_path)
    moved = [net.branches[n].rows.detach()[0] for n in ("word", "word_2")]
    table = plain.bundle.text.encoder.embeddings.token_embedding.weight
    cat, fox = (table[int(plain.bundle.text.tokenizer([w], 8)[0][1])] for w in ("cat", "fox"))
    assert [torch.allclose(m, b) for m, b in zip(moved, (cat, fox), strict=True)] == [False, False]
    files = [f"{tmp_path / 'learned_embeds'}{mark}.safetensors" for mark in ("", "_2")]
    mine = adapted(plain, [str(tmp_path / DIFFERENCES)], files)
    for said in ("a <toy> beside a <pet>", "a <pet>"):
        assert torch.allclose(mine.bundle.text([said]).tokens, task.bundle.text([said]).tokens, atol=1e-6)
    assert torch.allclose(seen(mine.bundle.model), seen(task.bundle.model), atol=1e-5)
    again = adapted(plain, [], [f"{tmp_path / 'a1111_2.safetensors'}:<pet>"])
    assert torch.allclose(again.bundle.text(["a <pet>"]).tokens, task.bundle.text(["a <pet>"]).tokens, atol=1e-6)


def test_what_several_words_ask_for_is_said_in_a_line(make: Any, tmp_path: Path) -> None:
    both = {"word": ("<toy>", "<pet>"), "begin": ("cat", "fox")}
    for fields in ({"begin": "cat"}, {"word": ("<toy>", "<toy>")}, {"word": (), "begin": ()}):
        with pytest.raises(UsageError, match="lists of one length, no word twice"):
            make(**{**both, **fields})
    task = make(**both)
    assert sum("holds none" in f.words for f in task.check(Job(str(tmp_path), 1))) == 4
    with pytest.raises(UsageError, match=r"0\.png'.* holds none of <toy>, <pet>"):
        task.net()


def test_the_first_token_teaches_nothing(make: Any) -> None:
    branch = next(b for n, b in make().net().branches.items() if n != "word")
    tokens = torch.randn(2, 3, 16)
    branch(tokens).sum().backward()
    assert torch.allclose(branch.weight.grad, tokens[:, 1:].sum((0, 1)).expand_as(branch.weight), atol=1e-5)
