"""The text's keys and values: computed once for every set of branches, again where the tokens change, never another bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm_pipe import CFG, Between, Cond, Model
from ldm_pipe.level import Level
from ldm_pipe.patch import Patched, Run
from ldm_pipe.speed.text_cache import MOST, TextCache

Draw = Callable[..., Tensor]
KEYS, VALUES = ("down_blocks.0.attentions.0.transformer_blocks.0.attn2." + n for n in ("to_k", "to_v"))


def test_once_a_run_and_the_same_bits(draw: Draw, counting: Any) -> None:
    count = counting(KEYS, VALUES, "conv_in")
    assert torch.equal(draw(count, TextCache()), draw())
    assert count.found == {KEYS: 1, VALUES: 1, "conv_in": 10}


def test_once_for_every_set_of_branches(draw: Draw, counting: Any) -> None:
    rule, count = Between(0.3, 0.8, CFG(3)), counting(KEYS)
    assert torch.equal(draw(count, TextCache(), rule=rule), draw(rule=rule))
    assert count.found == {KEYS: 2}


@torch.no_grad()
def test_a_condition_that_changes_is_computed_anew(model: Model, counting: Any) -> None:
    tokens, x = torch.randn(9, 1, 5, 12).double(), torch.randn(1, 4, 8, 8).double()
    walk = [Level(0.1 * k, 1 - 0.1 * k) for k in range(1, 10)]
    moving = model.bind(lambda level: Cond(tokens[round(float(level.alpha) * 10) - 1]))
    count = counting(KEYS)
    patched = Patched(model, (count, TextCache()), Run((*walk, Level(1.0, 0.0))))(moving)
    for level in (*walk, walk[-1], walk[0]):
        assert torch.equal(patched(x, level).x0, moving(x, level).x0)
    assert len(walk) > MOST
    assert count.found == {KEYS: 10}  # the last is remembered, the first is forgotten
