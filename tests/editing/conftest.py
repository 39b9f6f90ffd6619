"""A guided model in closed form: Gaussian data of four numbers, and tokens that add a constant to the noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, EPS, VP, Cond, Gaussian, Model, Noise, Sampler, levels
from ldm_pipe.editing.invert import Remake
from ldm_pipe.level import Path

COVARIANCE = 0.7 ** (torch.arange(4)[:, None] - torch.arange(4)).abs().double()
PRIOR = Gaussian(torch.zeros(4, dtype=torch.float64), COVARIANCE)
MAP = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # of full rank
NULL = 0.024 * torch.randn(1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PICTURE = torch.tensor([0.8, -0.5, 1.2, 0.3], dtype=torch.float64).reshape(1, 4, 1, 1)


@dataclass(frozen=True, eq=False)
class Affine:
    """eps = that of the prior + MAP tokens: zero tokens are the source prompt."""

    path: Path

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        assert cond.tokens is not None
        level = self.path.level(float(time[0]))
        flat = PRIOR(x.flatten(1), level).noise + cond.tokens[:, 0] @ MAP.T
        return flat.reshape(x.shape)


@pytest.fixture
def remake() -> Callable[..., Remake]:
    def made(sampler: Sampler, steps: int = 50, scale: float = 7.5, rows: int = 1, path: Path | None = None) -> Remake:
        path = path or VP.linear()
        model, rule = Model(Affine(path), path, EPS), CFG(scale)
        conds = {
            "cond": Cond(tokens=torch.zeros(rows, 1, 6, dtype=torch.float64)),
            "uncond": Cond(tokens=NULL.repeat(rows, 1, 1)),
        }
        noise = Noise(tuple(range(rows)), (4, 1, 1), dtype=torch.float64)
        return Remake(model.branches(**conds), rule, tuple(levels.leading(path, steps)), sampler, noise)

    return made
