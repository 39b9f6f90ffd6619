"""Edits take weights: words keep their places, and what would move them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_pipe import Pipeline, UsageError
from ldm_pipe.doors.edit import Edit

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipe(tiny: Tiny) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny("eps")), "cpu", "fp32")


def test_words_keep_their_places_under_weights(pipe: Pipeline) -> None:
    """A weight of 1 leaves the edit as it is to the bit; another one changes it, and the source does not see the target's."""
    settings = {"seed": 3, "steps": 3}
    plain = Edit("a fox", "a cat")(pipe, **settings)
    ones = Edit("a (fox:1)", "a (cat:1.0)")(pipe, **settings)
    heavy = Edit("a fox", "a (cat:1.6)")(pipe, **settings)
    assert torch.equal(plain.latents, ones.latents)
    assert torch.equal(plain.latents[0], heavy.latents[0])
    assert not torch.equal(plain.latents[1], heavy.latents[1])
    assert plain.settings.plain_prompt
    assert not heavy.settings.plain_prompt


def test_what_would_move_words_is_refused(pipe: Pipeline) -> None:
    for target in ("a cat AND a hat", "a BREAK cat", "a [cat:owl:0.5]", "a (cat) on a red hat on a blue tree"):
        with pytest.raises(UsageError, match="--edit takes weights"):
            Edit("a fox", target).plan(pipe, seed=3)
    for method in ("structured", "shape_guided"):
        with pytest.raises(UsageError, match=f"{method} takes no weights"):
            Edit("a fox", "a (cat)", method).plan(pipe, seed=3)
    assert Edit("a fox", "a cat on a red hat on a blue tree").plan(pipe, seed=3).given.plain_prompt
    assert Edit("a fox", "a (cat) AND a hat").plan(pipe, seed=3, plain_prompt=True).given.plain_prompt
