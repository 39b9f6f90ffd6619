"""CycleDiffusion's DPM-Encoder: Unifying Diffusion Models' Latent Space, with Applications to CycleDiffusion and Guidance,
Wu and De la Torre 2022, arXiv 2210.05559, eq. 6; and edit-friendly inversion, An Edit Friendly DDPM Noise Space: Inversion and
Manipulations, Huberman-Spiegelglas et al. 2023, arXiv 2304.06140, eq. 5 and 6.

Draw a noised picture for every level, then solve each step of a stochastic sampler for the noise with which it goes from one to
the next. The last step has to draw too, or nothing could make up for what the network cannot know: so the walk ends at a level
of almost no noise instead of none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ldm_pipe.editing.invert import Inverse, Remake
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import Recorded
from ldm_pipe.walk import Sampler, climb

END = Level(1.0, 1e-3)


@dataclass(frozen=True)
class DPMEncoder:
    """The noises with which a stochastic sampler makes the picture to the last digit, at one evaluation of every step.

    independent: noise the picture anew for every level (edit-friendly inversion) instead of climbing from level to level; the
    noises found are then larger than a sampler's own and hold more of the picture's layout.
    """

    sampler: ClassVar[tuple[str, dict[str, Any]]] = ("ddim", {"eta": 1.0})

    independent: bool = False

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """Raises UsageError for a sampler that draws no noise, keeps a memory, or uses its draw other than mean + std z."""
        levels = (*run.levels[:-1], END) if run.levels[-1].sigma == 0 else run.levels
        trail = self._trail(picture, levels, run)
        draws, x, denoise = [], trail[0], run.guided
        with torch.no_grad():
            for (here, there), wanted in zip(pairwise(levels), trail[1:], strict=True):
                mean, std = _kernel(denoise, x, here, there, run.sampler)
                draws.append((wanted - mean) / std)
                x = mean + std * draws[-1]  # not `wanted`: what the run will have, rounding and all
        return replace(run, levels=levels).inverse(picture, trail[0], noise=Recorded(tuple(draws)))

    def _trail(self, picture: Tensor, levels: tuple[Level, ...], run: Remake) -> list[Tensor]:
        """Noised pictures at every level, the noisiest first; the last one is the picture."""
        trail = [picture]
        for k in reversed(range(len(levels) - 1)):
            z = run.draws.at(k)("forward")
            below = levels[k + 1]
            trail.insert(0, levels[k].mix(picture, z) if self.independent else climb(trail[0], below, levels[k], z))
        return trail


def _kernel(denoise: Denoiser, x: Tensor, here: Level, there: Level, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a step, from the same step with a draw of 0, of 1 and of 2."""
    estimate = denoise(x, here)

    def drawn(value: float) -> Tensor:
        done = sampler.step(lambda x, level: estimate, x, here, there, None, lambda tag="step": torch.full_like(x, value))
        if done.memory is not None:
            raise UsageError(f"{type(sampler).__name__} keeps a memory; dpm_encoder takes one of single steps, such as ddpm")
        return done.x

    mean = drawn(0.0)
    std, twice = drawn(1.0) - mean, drawn(2.0) - mean
    if sampler.calls != 1 or not bool((std > 0).all()) or not torch.allclose(twice, 2 * std, rtol=1e-2):
        raise UsageError(f"{type(sampler).__name__} is no mean + std * noise; dpm_encoder takes ddpm or ddim at eta 1")
    return mean, std
