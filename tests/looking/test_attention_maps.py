"""`--attention-maps`: a sheet beside every image, one place for each word, and not a bit of the image changed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm_pipe import UsageError
from ldm_pipe.analysis.attention_maps import AttentionMaps, joint_maps
from ldm_pipe.cli import main
from ldm_pipe.looking.attention_maps import _readers, _said, _spans, recorded_in
from ldm_pipe.patch import changed, root
from ldm_pipe.pipeline import Output, Pipeline
from ldm_pipe.text import ClipText
from ldm_pipe.tokens import words


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


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
tiny_families: Any = importlib.import_module("tiny_families")
# Words of a prompt by their places among the tokens that the network attends to: one CLIP of 8, T5 alone, CLIP and then T5.
PLACES = {"pixart sigma": 300, "sd3": 8 + 256, "flux dev": 512}


@pytest.fixture(scope="module", params=PLACES)
def transformer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Pipeline]:
    """(name, pipeline) of a tiny transformer."""
    folder = tiny_families.save(request.param, tmp_path_factory.mktemp("maps") / "model")
    return request.param, Pipeline.from_pretrained(str(folder), "cpu", "fp32")


def test_a_transformer_is_watched_too(transformer: tuple[str, Pipeline], tmp_path: Path) -> None:
    """No bit changes; every place looks at the tokens with shares that sum to one; a sheet is written; nothing is left."""
    name, pipe = transformer
    before = {n: id(m.__dict__.get("forward")) for n, m in root(pipe.bundle.model).named_modules()}
    plan = pipe.plan(["a fox, on blue", "two bees"], seeds=(3, 4), steps=2, height=32, width=32)
    plain = next(pipe.run(plan))
    watched = recorded_in(str(tmp_path), pipe, plan)
    assert torch.equal(next(pipe.run(watched)).latents, plain.latents)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["001-3.png", "002-4.png"]
    watch = watched.guides[0]
    assert isinstance(watch, AttentionMaps)
    maps = watch.maps()
    assert maps.shape == (2, PLACES[name], *plan.shape[1:])
    torch.testing.assert_close(maps.sum(1), torch.ones(2, *plan.shape[1:]), rtol=1e-3, atol=1e-3)
    assert float(maps.std()) > 0
    assert before == {n: id(m.__dict__.get("forward")) for n, m in root(pipe.bundle.model).named_modules()}


def test_the_joint_map_is_that_of_the_network(transformer: tuple[str, Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's kernel is given, its columns of text made to sum to one."""
    name, pipe = transformer
    if name == "pixart sigma":
        return
    given, found = list[tuple[Tensor, Tensor]](), list[Tensor]()
    usual = torch.nn.functional.scaled_dot_product_attention
    network = root(pipe.bundle.model)
    site, module = next((n, m) for n, m in network.named_modules() if getattr(m, "add_k_proj", None) is not None)

    def watching(call: Callable[..., Any], *, hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Any:
        def keep(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
            given.append((query, key))
            return usual(query, key, *rest, **options)

        with monkeypatch.context() as m:
            m.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
            out = call(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **more)
        found.append(joint_maps(module, hidden_states, encoder_hidden_states, more.get("image_rotary_emb")))
        return out

    with changed(network, {site: [watching]}):
        next(pipe.run(pipe.plan("a fox", seed=3, steps=1, height=32, width=32)))
    (q, k), maps = given[0], found[0]
    length, count = maps.shape[1:]
    text = slice(0, count) if name == "flux dev" else slice(length, None)
    image = slice(count, None) if name == "flux dev" else slice(0, length)
    whole = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)[:, :, image, text]
    torch.testing.assert_close(maps, (whole / whole.sum(-1, keepdim=True)).mean(1), rtol=1e-3, atol=1e-5)


def test_words_are_found_among_the_tokens_of_every_reader(transformer: tuple[str, Pipeline]) -> None:
    """By what each of its encoders makes of the prompt up to there; signs have no map, and T5 joins them to a word."""
    name, pipe = transformer
    readers, count = _readers(pipe.bundle.text), PLACES[name]
    spans = _spans(readers, "red, fox", count)
    assert list(spans) == ["0 red", "2 fox"]
    t5 = readers[-1]
    first, upto = count - t5.window, [t5.tokenizer.length(text) - 1 for text in ("red", "red,", "red, fox")]
    expected = {"0 red": list(range(first, first + upto[0])), "2 fox": list(range(first + upto[1], first + upto[2]))}
    if name == "sd3":
        expected = {"0 red": [1, *expected["0 red"]], "2 fox": [3, *expected["2 fox"]]}
    assert spans == expected


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A tiny Flux whose first eight tokens of a text are all that it is given."""
    folder = tiny_families.save("flux dev", tmp_path_factory.mktemp("single") / "model")
    return Pipeline.from_pretrained(str(folder), "cpu", "fp32")


def test_the_single_blocks_of_flux_are_seen_too(flux: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One map of each block a step; of a single block the network's own softmax, its columns of text made to sum to 1."""
    network, given, kept = root(flux.bundle.model), list[tuple[Tensor, Tensor]](), list[Tensor]()
    usual, size = torch.nn.functional.scaled_dot_product_attention, (8, 8)
    plan = flux.plan("a fox", seed=3, steps=2, height=32, width=32)
    watch = AttentionMaps(network, size)
    next(flux.run(replace(plan, guides=(watch,))))
    blocks = [
        n for n, _ in network.named_modules() if n.split(".")[-2:-1] in (["transformer_blocks"], ["single_transformer_blocks"])
    ]
    assert len(blocks) == 2
    assert [count for _, count in watch.sums.values()] == [2 * len(blocks)]
    name = next(n for n in blocks if "single" in n)
    add = AttentionMaps._add

    def watching(call: Callable[..., Any], **more: Any) -> Any:
        def keep(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Tensor:
            given.append((query, key))
            return usual(query, key, *rest, **options)

        with monkeypatch.context() as m:
            m.setattr(torch.nn.functional, "scaled_dot_product_attention", keep)
            m.setattr(AttentionMaps, "_add", lambda self, shape, maps: (kept.append(maps), add(self, shape, maps)))
            return call(**more)

    one = flux.plan("a fox", seed=3, steps=1, height=32, width=32)
    with changed(network, {name: [watching]}):
        next(flux.run(replace(one, guides=(watch,))))
    (q, k), maps = given[-1], kept[-1]
    count = maps.shape[2]
    whole = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)[:, :, count:, :count]
    torch.testing.assert_close(maps, (whole / whole.sum(-1, keepdim=True)).mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "prompt",
    [
        "fox on red",
        "a (fox:1.4) on [red]",
        "fox qqqq fox zzzzz background fox",
        "red fox BREAK (blue:1.2) cat",
        "a , b , ! fox on blue",
        "qwxzqwxzqwxzqwxz fox",
        "cat [red:blue:0.5] fox, the low quality fox on blue background",
    ],
)
def test_the_tokens_of_a_word_are_its_own(tiny: Callable[[str], Path], prompt: str) -> None:
    """In every window, whatever its weight: what stands at the places of a word, end to end, is what the word alone becomes."""
    text = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32").bundle.text
    assert isinstance(text, ClipText)
    read, tower = _said(prompt, False), text._tower
    ids = [i for row, _ in tower._rows(read) for i in row]
    found = _spans([text], read, len(ids))
    spoken = [w for chunk in read.chunks for w in words("".join(run.text for run in chunk)) if w[0].isalnum()]
    assert [name.split(" ")[1] for name in found] == spoken
    for name, spots in found.items():
        word = name.split(" ")[1]
        assert [ids[k] for k in spots] == text.tokenizer([word], 99)[0][1 : text.tokenizer.length(word) - 1], name
    taken = [k for spots in found.values() for k in spots]
    assert len(set(taken)) == len(taken)


def test_a_plain_prompt_is_read_as_it_stands(tiny: Callable[[str], Path]) -> None:
    """And what its one window does not show has no map."""
    text = Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32").bundle.text
    found = _spans([text], _said("a (fox) BREAK on red blue cat", True), 8)
    assert list(found)[:2] == ["0 a", "1 (fox)"]
    assert max(k for spots in found.values() for k in spots) < 7


def test_a_word_is_one_word_to_every_reader() -> None:
    """Also where one of them has no token for the sign before it."""

    @dataclass(frozen=True)
    class Reader:
        found: list[tuple[str, list[int]]]
        window: int = 8

        def places(self, prompt: str) -> list[tuple[str, list[int]]]:
            return self.found

    clip, t5 = Reader([("red", [1]), (",", [2]), ("fox", [3])]), Reader([("red", [0]), (",", []), ("fox", [1])])
    assert _spans([clip, t5], "red, fox", 24) == {"0 red": [1, 16], "2 fox": [3, 17]}


def test_other_encoders_are_refused() -> None:
    with pytest.raises(UsageError, match="CLIP or T5"):
        _readers(object())


def test_a_file_in_the_folders_place_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("maps").write_text("")
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *given, **more: pytest.fail("a model was loaded"))
    for folder in ("maps", "maps/of/mine"):
        assert main(["-p", "a fox", "--attention-maps", folder, "-o", "out.png"]) == 2
        assert "--attention-maps takes a folder; 'maps' is a file" in capsys.readouterr().err
