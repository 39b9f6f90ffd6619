"""How near a sampler comes to a Gaussian, for how many evaluations: exact where it is linear in x, else from draws."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_pipe.analysis.affine import outcome
from ldm_pipe.analysis.gaussian import Gaussian
from ldm_pipe.analysis.wasserstein import gaussian_w2
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.walk import Sampler, sample

DRAWS = 200_000


@dataclass(frozen=True)
class Draws:
    """Standard normal draws of `count` images of a shape, float64, by walk index and tag. heard: the tags asked for so far."""

    count: int
    shape: tuple[int, ...]
    heard: list[str] = field(default_factory=list)

    def at(self, index: int) -> StepNoise:
        """The draws of one step."""

        def draw(tag: str = "step") -> Tensor:
            self.heard.append(tag)
            random = np.random.Generator(np.random.Philox(key=[index + 1, zlib.crc32(tag.encode())]))
            return torch.from_numpy(random.standard_normal((self.count, *self.shape)))

        return draw


class Cost(NamedTuple):
    """evaluations: of the network on a walk, for each image. draws: is any noise drawn on the way?"""

    evaluations: int
    draws: bool


def cost(prior: Gaussian, sampler: Sampler, levels: Sequence[Level]) -> Cost:
    """What a sampler takes on its walk over these levels, seen on 16 images of the prior."""
    asked, draws = list[Level](), Draws(16, (len(prior.mean), 1, 1))
    walk = sampler.walk(levels)
    x = sampler.start(draws.at(-1)("start"), walk[0])
    draws.heard.clear()

    def denoise(x: Tensor, level: Level) -> Estimate:
        asked.append(level)
        return exact(prior)(x, level)

    sample(denoise, x, walk, sampler, draws)
    return Cost(len(asked), bool(draws.heard))


def distance(prior: Gaussian, sampler: Sampler, levels: Sequence[Level]) -> float:
    """W2 between what a sampler makes from pure noise and what lies at the last level. Of a sampler that is not linear in x it
    is that of the moments of 200,000 images, which is about 0.01 where nothing is wrong."""
    alpha, sigma = levels[-1]
    right = alpha * prior.mean, alpha**2 * prior.covariance + sigma**2 * torch.eye(len(prior.mean), dtype=torch.float64)
    walk, shape = sampler.walk(levels), (len(prior.mean), 1, 1)
    try:
        return gaussian_w2(outcome(exact(prior), walk, sampler, shape), right)
    except UsageError as error:
        if "not affine" not in str(error):
            raise
    draws = Draws(DRAWS, shape)
    x = sample(exact(prior), sampler.start(draws.at(-1)("start"), walk[0]), walk, sampler, draws).reshape(DRAWS, -1)
    return gaussian_w2((x.mean(0), x.T.cov()), right)


def exact(prior: Gaussian) -> Denoiser:
    """The denoiser, with a learned variance halfway between its bounds for a sampler that asks for one."""

    def denoise(x: Tensor, level: Level) -> Estimate:
        return prior(x, level)._replace(log_var=torch.zeros_like(x))

    return denoise
