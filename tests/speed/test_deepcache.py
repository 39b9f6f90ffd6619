"""DeepCache: only the outermost layers run between two whole steps, and what they are given is what the paper says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import Model, UsageError
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level
from ldm_pipe.patch import Run, changed, root
from ldm_pipe.speed.deepcache import DeepCache

Draw = Callable[..., Tensor]
OUTER = ("conv_in", "down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "down_blocks.0.downsamplers.0", "mid_block",
         "up_blocks.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1", "up_blocks.1.resnets.2", "conv_out")  # fmt: skip


@pytest.mark.parametrize(
    ("interval", "branch", "expected"),
    [
        (2, 0, (6, 3, 3, 3, 3, 3, 3, 3, 6, 6)), (3, 0, (6, 2, 2, 2, 2, 2, 2, 2, 6, 6)), (2, 1, (6, 6, 3, 3, 3, 3, 3, 6, 6, 6)),
        (6, 2, (6, 6, 6, 1, 1, 1, 6, 6, 6, 6)),
    ],
)  # fmt: skip
def test_what_runs_how_often(interval: int, branch: int, expected: tuple[int, ...], draw: Draw, counting: Any) -> None:
    count = counting(*OUTER)
    draw(count, DeepCache(interval, branch), steps=6)
    assert tuple(count.found[name] for name in OUTER) == expected


@torch.no_grad()
def test_the_last_layer_sees_the_old_deep_feature_and_the_new_skip(model: Model) -> None:
    """Eq. 8: written out by hand for branch 0."""
    network: Any = root(model)
    run = Run((Level(0.1, 0.9), Level(0.2, 0.8), Level(1.0, 0.0)))
    changes: Any = {n: [c] for n, c in DeepCache(2).changes(network, run).items()}
    x, later, tokens = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 12).double()
    old, new = torch.tensor([900.0, 900.0]), torch.tensor([500.0, 500.0])
    last, deep = network.up_blocks[1], list[Tensor]()

    def watch(call: Callable[..., Any], *args: Any) -> Any:
        deep.append(call(*args))
        return deep[-1]

    with changed(network, {"up_blocks.1.attentions.1": [watch]}), changed(network, changes):
        for level, given, time in ((0, x, old), (1, later, new)):
            token = ROWS.set(Rows(("cond",), 2, run.levels[level]))
            out = network(given, time, encoder_hidden_states=tokens)[0]
            ROWS.reset(token)
    vector = network._vector(later, new, tokens, None, {})
    y = last.resnets[2](torch.cat([deep[0], network.conv_in(later)], dim=1), vector)
    y = last.attentions[2](y, tokens)
    torch.testing.assert_close(out, network.conv_out(F.silu(network.conv_norm_out(y))))


def test_a_longer_interval_is_further_from_the_whole(draw: Draw) -> None:
    plain = draw(steps=12)
    errors = [float((draw(DeepCache(k), steps=12) - plain).norm()) for k in (1, 2, 4, 12)]
    assert errors[0] == 0
    assert errors == sorted(errors)


def test_a_network_of_no_unet_is_refused() -> None:
    with pytest.raises(UsageError, match="no way down"):
        DeepCache().changes(torch.nn.Linear(1, 1), Run((Level(0.1, 0.9), Level(1.0, 0.0))))
