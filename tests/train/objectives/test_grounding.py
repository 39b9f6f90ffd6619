"""Grounding: attention to the right tokens is free, to the wrong ones it costs its cross-entropy; the network is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from train.objectives.grounding import FLOOR, Maps, grounding, watching

NAMED = torch.tensor([[[1.0, 0, 0], [0, 0, 1]]])  # thing 0 is named by token 0, thing 1 by token 2
BOXES = torch.tensor([[[0.0, 0, 0.5, 1], [0.5, 0, 1, 1]]])  # the left half and the right half


def maps(left: list[float], right: list[float], heads: int = 1) -> Maps:
    """An attention of 2x2 cells whose logits are `left` in the left column, `right` in the right one."""
    keys = torch.eye(3)[None].repeat(1, 1, heads)
    rows = [left, right, left, right]
    return Maps(torch.tensor([rows]).repeat(1, 1, heads) * 3**0.5, keys, heads)


def loss_of(*rows: list[float], named: Tensor = NAMED, boxes: Tensor = BOXES) -> float:
    return grounding([maps(*rows)], named, boxes).item()


def test_even_attention_costs_a_coin_toss_and_right_attention_nothing() -> None:
    assert loss_of([0, 0, 0], [0, 0, 0]) == pytest.approx(math.log(2), abs=1e-5)
    assert loss_of([20, 0, 0], [0, 0, 20]) == pytest.approx(math.log1p(FLOOR / (1 + FLOOR)), abs=1e-5)
    assert loss_of([0, 0, 20], [20, 0, 0]) > 6


def test_it_is_the_cross_entropy_over_the_masses() -> None:
    p = torch.tensor([1.0, 0.2, 0.5]).softmax(0) + FLOOR
    expected = -math.log(p[0] / (p[0] + p[2]))
    mirrored = [0.5, 0.2, 1.0]
    assert loss_of([1.0, 0.2, 0.5], mirrored) == pytest.approx(expected, abs=1e-5)


def test_only_covered_cells_and_only_told_samples_count() -> None:
    boxes = BOXES.clone()
    boxes[0, 1] = 0  # the right thing covers nothing: its column may attend to what it likes
    alone = loss_of([20, 0, 0], [20, 0, 0], boxes=boxes)
    assert alone == pytest.approx(loss_of([20, 0, 0], [0, 0, 20]), abs=1e-5)
    assert loss_of([5, 0, 0], [0, 0, 0], named=torch.zeros_like(NAMED)) == 0
    one, other = maps([1, 0, 0], [0, 0, 0]), maps([9, 0, 0], [0, 0, 9])
    both = Maps(torch.cat([one.queries, other.queries]), torch.cat([one.keys, other.keys]), 1)
    untold = torch.cat([NAMED, torch.zeros_like(NAMED)])
    assert grounding([both], untold, BOXES.repeat(2, 1, 1)).item() == pytest.approx(loss_of([1, 0, 0], [0, 0, 0]), abs=1e-6)


def test_a_box_covers_the_cells_it_touches() -> None:
    boxes = torch.tensor([[[0.0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]])  # top left and bottom right of 2x2
    rows = torch.tensor([[[9.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 9.0]]]) * 3**0.5
    right = Maps(rows, torch.eye(3)[None], 1)
    turned = Maps(rows[:, [1, 0, 3, 2]], torch.eye(3)[None], 1)
    assert grounding([right], NAMED, boxes) < 0.01 < 0.6 < grounding([turned], NAMED, boxes)


def test_heads_are_averaged() -> None:
    two = maps([0, 0, 0], [0, 0, 0], heads=2)
    queries = two.queries.clone()
    queries[:, 0::2, :3] = torch.tensor([30.0, 0, 0])  # the first head of the left column is right, the second even
    masses = Maps(queries, two.keys, 2).masses(NAMED)
    torch.testing.assert_close(masses[0, 0], torch.tensor([0.5 + 1 / 6, 1 / 6]), atol=1e-4, rtol=0)


def test_the_network_is_watched_and_left_as_it_was() -> None:
    from diffusers import UNet2DConditionModel

    blocks = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    net = UNet2DConditionModel(
        8, 4, 4, layers_per_block=1, block_out_channels=(32, 32), down_block_types=blocks[0], up_block_types=blocks[1],
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    x, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    with watching(net) as seen:
        out = net(x, 3, tokens).sample
    sites = [m for n, m in net.named_modules() if n.endswith("attn2")]
    assert [m.queries.shape[-1] for m in seen] == [32] * len(sites)
    assert all(m.keys.shape[:2] == (2, 5) and m.heads == 2 for m in seen)
    assert not any(m._forward_hooks for m in net.modules() if isinstance(m, nn.Module))
    grounding(seen, torch.eye(5)[None, :2].repeat(2, 1, 1), torch.rand(2, 2, 4).sort(-1).values).backward()
    assert all(m.to_k.weight.grad is not None for m in sites)
    assert torch.equal(net(x, 3, tokens).sample, out)
