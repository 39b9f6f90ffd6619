"""Two branches that disagree, at a level between the ends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_pipe import VELOCITY, Cond, Estimate, Flow, Level, Model
from ldm_pipe.model import Branches

X = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    assert cond.tokens is not None
    return torch.tanh(x * cond.tokens.reshape(-1, 1, 1, 1)) + cond.tokens.reshape(-1, 1, 1, 1)


@pytest.fixture
def x() -> Tensor:
    return X


@pytest.fixture
def run() -> Branches:
    """Branches cond and uncond of a toy network on the flow path that predicts v; fresh counts."""
    model = Model(_network, Flow(), VELOCITY)
    rows = {name: Cond(tokens=torch.full((3, 1, 1), value).double()) for name, value in (("cond", 0.9), ("uncond", -0.4))}
    return model.branches(**rows)


@pytest.fixture
def estimates(run: Branches, x: Tensor) -> dict[str, Estimate]:
    """Both estimates of x at (0.4, 0.6), the positive one with a learned variance."""
    found = run(x, Level(0.4, 0.6), ("cond", "uncond"))
    run.evaluations.clear()
    return found | {"cond": found["cond"]._replace(log_var=x)}
