"""Hold the known part of a picture while the rest is drawn: inpainting by projection of x0, hard and soft.

x0 is replaced where the picture is known and the noise follows, so that every sampler on every path keeps the known part
(Denoising Diffusion Null-Space Model, Wang et al. 2022, arXiv 2212.00490, eq. 13, with a mask as the operator). A soft mask
gives each place its own strength (Differential Diffusion, Levin and Fried 2023, arXiv 2306.00950, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate


@dataclass(frozen=True, eq=False)
class Keep:
    """A Guide. known: x0 [1 or B,C,H,W]; mask: [1 or B,1,H,W] in 0..1, 1 = drawn anew, 0 = kept; a value between is kept while
    u / start is above it, so it is redrawn with that share of the strength. start: u of the walk's first level.
    """

    known: Tensor
    mask: Tensor
    start: float = 1.0

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser whose x0 agrees with the known part."""

        def keep(x: Tensor, level: Level) -> Estimate:
            estimate, held = denoise(x, level), self.mask < float(level.u) / self.start
            known = self.known.to(x)
            noise = torch.where(held, level.noise(x, known), estimate.noise)
            return estimate._replace(x0=torch.where(held, known, estimate.x0), noise=noise)

        return keep
