"""Inversion: from a picture back to the x that a deterministic sampler makes it from.

DDIM inversion (Denoising Diffusion Implicit Models, Song et al. 2020, arXiv 2010.02502, section 4.3; Diffusion Models Beat
GANs, Dhariwal and Nicol 2021, arXiv 2105.05233, appendix F) reads the step backwards with the noise estimated at the less
noisy x, under the noisier level. Fixed-point corrections (AIDI, Pan et al. 2023, arXiv 2309.04907, eq. 8) estimate it again
at the x just found, until the step really comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import NoNoise
from ldm_pipe.walk import Sampler, sample


@dataclass(frozen=True, eq=False)
class Inverse:
    """x: [B,C,H,W] at the first level of the walk. error: [B], the root mean square by which the walk from there misses the
    picture it was found for."""

    x: Tensor
    error: Tensor


def invert(
    denoise: Denoiser, picture: Tensor, levels: Sequence[Level], sampler: Sampler, corrections: int = 0
) -> Inverse:
    """The x at levels[0] from which `sampler` makes `picture` [B,C,H,W] along the falling levels, with one evaluation of every
    step and `corrections` more, and the walk itself once to tell the error.

    Any deterministic sampler without memory: Euler, DDIM at eta 0, Heun. Raises UsageError for one that keeps a memory (a
    multistep method read backwards is no inverse), draws noise, or for levels that rise.
    """
    if any(float(b.u) > float(a.u) for a, b in pairwise(levels)):
        raise UsageError("inversion takes the falling levels of the walk, not their reverse")
    x = picture
    with torch.no_grad():
        for here, there in reversed(list(pairwise(levels))):
            target, gain = x, _gain(here, there)
            for _ in range(corrections + 1):
                x = x + gain * (target - _step(denoise, x, here, there, sampler))
    back = sample(denoise, x, levels, sampler, NoNoise(x))
    return Inverse(x, (back - picture).square().flatten(1).mean(1).sqrt())


def _gain(here: Level, there: Level) -> float:
    """What x is multiplied by on the way up while the noise stands still; at alpha = 0, while x0 does."""
    if here.alpha > 0:
        return float(here.alpha / there.alpha)
    if there.sigma == 0:
        raise UsageError("one step from pure noise to a picture has no inverse; use more steps")
    return float(here.sigma / there.sigma)


def _step(denoise: Denoiser, x: Tensor, here: Level, there: Level, sampler: Sampler) -> Tensor:
    def drawn(tag: str = "step") -> Tensor:
        raise UsageError(f"{type(sampler).__name__} draws noise; inversion takes a deterministic one, such as ddim at eta 0")

    done = sampler.step(denoise, x, here, there, None, drawn)
    if done.memory is not None:
        raise UsageError(f"{type(sampler).__name__} keeps a memory; inversion takes a sampler of single steps, such as ddim")
    return done.x
