"""The grammar of prompts in the text encoders that are not one CLIP: T5, Gemma, several together, and classes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.emphasis import emphasised
from ldm_pipe.grammar import parse
from ldm_pipe.networks.dit import Labels
from ldm_pipe.networks.flux import FluxText
from ldm_pipe.networks.pixart import PixArtText
from ldm_pipe.networks.sana import SanaText
from ldm_pipe.networks.sd3 import SD3Text
from ldm_pipe.prompt import Wording
from ldm_pipe.text import ClipTower, MaskedTower
from ldm_pipe.tokens import FromTransformers, begun
from ldm_pipe.wording import notices, reads

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
tiny_texts = importlib.import_module("tiny_texts")


def made(parts: tuple[Any, Any]) -> dict[str, Any]:
    return {"tokenizer": FromTransformers(parts[0]), "encoder": parts[1].requires_grad_(False)}


@pytest.fixture(scope="module")
def t5() -> MaskedTower:
    torch.manual_seed(0)
    return MaskedTower(**made(tiny_texts.t5()), window=10, lower=True)


@pytest.fixture(scope="module")
def clips() -> tuple[ClipTower, ...]:
    torch.manual_seed(1)
    return tuple(ClipTower(**made(tiny_texts.clip(True, **more))) for more in ({}, {"hidden_size": 12, "projection_dim": 10}))


def read(prompt: str) -> Wording:
    (words,) = parse(prompt).at(0, 1)
    return words


def tensor(cond: Cond) -> Tensor:
    assert cond.tokens is not None
    return cond.tokens


def weighed(plain: Tensor, places: dict[int, float]) -> Tensor:
    weights = torch.ones(plain.shape[:2])
    for place, weight in places.items():
        weights[:, place] = weight
    return emphasised(plain, weights)


def test_t5_takes_weights_at_the_places_of_the_words(t5: MaskedTower) -> None:
    text = PixArtText(t5)
    plain = text(["a fox on blue"])
    found = text([read(" A (FOX:1.3) [on] blue")])  # one token each, and an end
    torch.testing.assert_close(tensor(found), weighed(tensor(plain), {1: 1.3, 2: 1 / 1.1}), rtol=0, atol=0)
    assert found.mask is not None
    assert plain.mask is not None
    assert torch.equal(found.mask, plain.mask)
    assert torch.equal(tensor(text([read("a (fox:1) on blue")])), tensor(plain))
    assert not torch.equal(tensor(found), tensor(plain))


def test_a_space_before_a_word_does_not_begin_it() -> None:
    """Gemma's tokens hold the space before them, T5's do not."""
    assert begun("a  fox ", [(0, 0), (0, 1), (1, 6), (6, 7), (0, 0)], [1, 0, 0, 0, 1]) == [-1, 0, 3, 6, -1]


def test_one_window_has_no_chunks_and_says_what_it_cuts(t5: MaskedTower) -> None:
    text = PixArtText(t5)
    assert torch.equal(tensor(text([read("a fox BREAK on blue")], 3)), tensor(text(["a fox on blue"])))
    assert text.chunks(read("a BREAK a")) == 1
    (said,) = notices(text, "a fox BREAK " + "(blue:1.2) " * 9, False)
    assert "2 token(s) longer than the 10" in said
    found, plain = text([read("(" + "blue " * 20 + ":1.2)")]), text(["blue " * 20])
    torch.testing.assert_close(tensor(found), weighed(tensor(plain), dict.fromkeys(range(9), 1.2)), rtol=0, atol=0)


def test_sd3_has_chunks_of_clip_and_one_of_t5(t5: MaskedTower, clips: tuple[ClipTower, ...]) -> None:
    text = SD3Text(clips, t5, 32)
    found = text([read("a (fox:1.3) BREAK blue")])
    parts = [text([read(p)]) for p in ("a (fox:1.3)", "blue", "a (fox:1.3) blue")]
    assert text.chunks(read("a (fox:1.3) BREAK blue")) == 2
    expected = torch.cat([tensor(parts[0])[:, :8], tensor(parts[1])[:, :8], tensor(parts[2])[:, 8:]], 1)
    torch.testing.assert_close(tensor(found), expected, rtol=1e-5, atol=1e-6)
    assert found.pooled is not None
    torch.testing.assert_close(found.pooled, text(["a fox"]).pooled, rtol=1e-5, atol=1e-6)
    without = SD3Text(clips, None, 32)
    assert tensor(without([read("a BREAK a BREAK a"), "a"], 3)).shape == (2, 24 + 256, 32)
    assert tensor(without(["a"], 3)).shape == (1, 24 + 256, 32)


def test_flux_takes_t5_and_the_pooled_vector_of_the_first_chunk(t5: MaskedTower, clips: tuple[ClipTower, ...]) -> None:
    text = FluxText(clips[0], t5)
    found, plain = text([read("a (fox:1.3) BREAK blue")]), text(["a fox blue"])
    torch.testing.assert_close(tensor(found), weighed(tensor(plain), {1: 1.3}), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.pooled, text(["a fox"]).pooled, rtol=1e-5, atol=1e-6)
    assert text.chunks(read("a BREAK a")) == 1


def test_sana_weighs_the_prompt_and_not_its_instruction() -> None:
    """One token a letter and a first one; of the 300 tokens the first is kept, and the last 299 from some way in."""
    torch.manual_seed(0)
    gemma = MaskedTower(**made(tiny_texts.gemma()), window=300)
    text = SanaText(gemma, "say: ")
    plain, found = text(["a fox"]), text([read(" A (fox:2)")])
    changed = (tensor(found) / tensor(plain)).std(-1) > 1e-3
    assert torch.equal(changed, changed & False)  # every token is only scaled
    ratio = (tensor(found) / tensor(plain)).mean(-1)[0]
    heavy = (ratio / ratio[0] - 1).abs() > 0.5
    assert int(heavy.sum()) == 3
    negative = text.negative([read("(fox:2) a")])
    assert torch.equal(tensor(text.negative([read("fox a")])), tensor(text.negative(["fox a"])))
    assert not torch.equal(tensor(negative), tensor(text.negative(["fox a"])))


def test_names_of_classes_hold_no_grammar() -> None:
    labels = Labels({"crane (bird)": 3}, 10)
    assert not reads(labels, False)
    assert labels(["crane (bird)"]).extras["label"].tolist() == [3]
    assert notices(labels, "crane (bird", False) == []
