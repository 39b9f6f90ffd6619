"""`train concepts`: with both words known, each concept's own tokens meet its own keys and values."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_pipe import Pipeline, adapted, lora
from ldm_pipe.errors import UsageError
from train.__main__ import main
from train.concepts import concepts, merged, of_captions, of_word, spread
from train.loop import run
from train.tasks.custom_diffusion import DIFFERENCES, CustomDiffusion
from train.tasks.textual_inversion import DIFFUSERS

CAPTIONS = ["a fox on red", "an owl on blue", "a cat", "two dogs on green", "an owl", "a red fox", "a dog", "the cat on blue"]


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """W0 [5,12], regular tokens [40,12]; the words of two concepts, 3 and 2 tokens, and what their weights moved by."""
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return some(5, 12), some(40, 12), [some(3, 12), some(2, 12)], [some(5, 12), some(5, 12)]


def test_the_merge_is_the_solution_of_the_constrained_problem(drawn: Any) -> None:
    """Against the KKT system of min |(W - W0) C_reg'|^2 under W C*' = V, solved whole."""
    w0, regular, words, moves = drawn
    c, v = torch.cat(words), torch.cat([t @ (w0 + m).T for t, m in zip(words, moves, strict=True)])
    found = w0 + merged(words, moves, spread(words, regular))
    assert torch.allclose(c @ found.T, v, atol=1e-12)
    gram = regular.T @ regular
    whole = torch.cat([torch.cat([gram, c.T], 1), torch.cat([c, torch.zeros(5, 5).double()], 1)])
    solved = torch.linalg.solve(whole, torch.cat([gram @ w0.T, v]))[:12].T
    assert torch.allclose(found, solved, atol=1e-11)
    twice, one = [torch.cat([words[0], words[0]])], merged(words[:1], moves[:1], spread(words[:1], regular))
    assert torch.allclose(merged(twice, moves[:1], spread(twice, regular)), one, atol=1e-12)
    with pytest.raises(UsageError, match="give more captions, or a ridge"):
        spread(words, regular[:7])
    assert torch.allclose(c @ (w0 + merged(words, moves, spread(words, regular[:7], ridge=0.1))).T, v, atol=1e-10)
    with pytest.raises(UsageError, match="no weights meet 13 tokens exactly"):
        spread([regular[:13]], regular)


def test_the_weighed_merge_is_the_least_squares_of_both(drawn: Any) -> None:
    """Against all rows stacked, solved whole, every concept with the same share; with much weight it is the constrained one."""
    w0, regular, words, moves = drawn
    parts, wanted = [regular / 40**0.5, 0.1**0.5 * torch.eye(12).double()], [regular @ w0.T / 40**0.5, 0.1**0.5 * w0.T]
    for tokens, move in zip(words, moves, strict=True):
        share = (3 / (2 * len(tokens))) ** 0.5
        parts.append(share * tokens)
        wanted.append(share * tokens @ (w0 + move).T)
    solved = torch.linalg.lstsq(torch.cat(parts), torch.cat(wanted)).solution.T
    assert torch.allclose(w0 + merged(words, moves, spread(words, regular, 3.0, 0.1)), solved, atol=1e-12)
    exact = merged(words, moves, spread(words, regular))
    assert torch.allclose(merged(words, moves, spread(words, regular, 1e9)), exact, atol=1e-6)
    with pytest.raises(UsageError, match="give more captions, or a ridge"):
        spread(words, regular[:3], 3.0)


@pytest.fixture(scope="module")
def exports(pictures: Any, tiny: Callable[[str], Path], job: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, photos = tmp_path_factory.mktemp("concepts"), pictures()
    found = []
    for word, kind in (("<toy>", "fox"), ("<pet>", "owl")):
        table = {"path": str(photos), "cache": str(folder / "cache"), "buckets": False}
        task = CustomDiffusion(table, str(tiny("eps")), instance=f"a {word} {kind}", word=word, begin=kind, prior="")
        found.append(run(task, job(folder / kind, lr=0.05, seed=len(found))))
    return found


def test_each_word_meets_its_own_weights(exports: list[Path], tiny: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    file, given = tmp_path / "both.safetensors", [f"{exports[0]}=a <toy> fox", f"{exports[1]}=a <pet> owl"]
    words = [w for text in given for w in ("--concept", text)]
    more = ["--model", str(tiny("eps")), "--captions", str(tmp_path / "captions.txt"), "-o", str(file)]
    more += ["--weight", "inf", "--ridge", "1e-3"]  # features of an untrained text encoder add up to 0: one width is missing
    assert main(["concepts", *words, *more]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"--lora {file}" in said
    assert said.count(DIFFUSERS) == 2
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    learned = [str(e / DIFFUSERS) for e in exports]
    both = adapted(plain, [str(file)], learned).bundle
    before, after = (lora.parts(b)["network"] for b in (plain.bundle, both))
    layers = [n for n, _ in before.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len(load_file(file)) == len(layers) > 3
    regular = of_captions(both, CAPTIONS, exact=True).double()
    assert len(regular) == sum(len(c.split()) + 2 for c in CAPTIONS)
    for export, word, caption in zip(exports, ("<toy>", "<pet>"), ("a <toy> fox", "a <pet> owl"), strict=True):
        own = lora.parts(adapted(plain, [str(export / DIFFERENCES)]).bundle)["network"]
        tokens = of_word(both, word, caption, exact=True)
        assert len(tokens) == 2  # the word and its class
        assert torch.allclose(tokens, both.text([caption]).tokens[0, 2:4])
        for layer in layers:
            weights: list[Any] = [m.get_submodule(layer).weight for m in (after, own, before)]
            new, wanted, old = (tokens @ w.T for w in weights)
            assert torch.allclose(new, wanted, atol=1e-4)
            assert not torch.allclose(new, old, atol=1e-3)
            kept, lost = ((regular @ (w - weights[2]).double().T).square().mean() for w in (weights[0], weights[1]))
            assert kept < 4 * lost  # what the captions say changes about as little as in one training


def test_weighed_all_that_the_network_reads_counts_in_every_caption(exports: list[Path], tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    told = {exports[0]: ["a <toy> fox", "the <toy> fox on blue"], exports[1]: ["a <pet> owl"]}
    file, given = tmp_path / "both.safetensors", [f"{e}={c}" for e, said in told.items() for c in said]
    used = concepts(str(tiny("eps")), given, str(tmp_path / "captions.txt"), file, 5.0, 1e-3)
    assert [u.count(DIFFUSERS) for u in used] == [2]
    plain = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32", "sdpa")
    both = adapted(plain, [], [str(e / DIFFUSERS) for e in exports]).bundle
    window, regular = both.text.window, of_captions(both, CAPTIONS)
    assert len(regular) == window * len(CAPTIONS)  # the filling too
    layer = next(n for n, _ in lora.parts(both)["network"].named_modules() if n.endswith("attn2.to_k"))
    before, words, moves = lora.parts(plain.bundle)["network"].get_submodule(layer).weight, [], []
    for (export, said), word in zip(told.items(), ("<toy>", "<pet>"), strict=True):
        tokens = torch.cat([of_word(both, word, c) for c in said])
        assert torch.equal(tokens, torch.cat([both.text([c]).tokens[0, 2:] for c in said]))
        own = lora.parts(adapted(plain, [str(export / DIFFERENCES)]).bundle)["network"].get_submodule(layer).weight
        words.append(tokens)
        moves.append(own - before)
    new = merged(words, moves, spread(words, regular, 5.0, 1e-3))
    found = load_file(file)[f"lora_unet_{layer.replace('.', '_')}.diff"]
    assert float(new.abs().max()) > 1e-3
    assert torch.allclose(found.double(), new, atol=1e-5)


def test_what_is_missing_is_one_line(exports: list[Path], tiny: Any, tmp_path: Path, capsys: Any) -> None:
    captions, empty = tmp_path / "captions.txt", tmp_path / "empty.txt"
    captions.write_text("a fox\n")
    empty.write_text("\n")
    copied = shutil.copytree(exports[0], tmp_path / "again")
    good = [f"{exports[0]}=a <toy> fox", f"{exports[1]}=a <pet> owl"]
    for given, file, said in (
        (good[:1], captions, "of two folders or more"),
        ([*good[:1], *good[:1]], captions, "of two folders or more"),
        ([*good[:1], str(exports[1])], captions, "of two folders or more"),
        ([*good[:1], f"{tmp_path}=a <pet>"], captions, f"has no {DIFFERENCES}"),
        ([*good[:1], f"{exports[1]}=an owl"], captions, "does not hold the word '<pet>'"),
        ([*good[:1], f"{copied}=a <toy>"], captions, "'<toy>' is a token of the model already"),
        (good, captions, "give more captions, or a ridge above 0"),
        (good, empty, "holds no caption"),
        (good, tmp_path / "none.txt", "cannot be read"),
    ):
        words = [w for text in given for w in ("--concept", text)]
        more = ["--model", str(tiny("eps")), "--captions", str(file), "-o", str(tmp_path / "new.safetensors")]
        assert main(["concepts", *words, *more]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "new.safetensors").exists()
