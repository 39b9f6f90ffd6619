"""Denoising Diffusion Models for Plug-and-Play Image Restoration, Zhu et al. 2023, arXiv 2305.08995, eq. 12-15.

A Guide. The kernel that goes with it is `renoise` with eta = sqrt(zeta): zeta .1 for deblurring, .25 for super-resolution, 1
for inpainting, 100 steps; the noise follows from the corrected x0. The data count at every level (the official code leaves
out the last one).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.restore.operator import Measurement


@dataclass(frozen=True)
class DiffPIR:
    """Move x0 to argmin |y - A x|^2 + rho |x - x0|^2 with rho = weight (deviation alpha / sigma)^2.

    weight: the paper's lambda, in units of images in -1..1 (the official code's works out as a quarter of it). blend: how far
    to move, 0 not at all. least: the deviation is taken for no less.
    """

    measurement: Measurement
    weight: float = 1.0
    blend: float = 1.0
    least: float = 0.001

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser whose x0 leans to the data."""
        if self.blend == 0:
            return denoise
        operator, y = self.measurement.operator, self.measurement.y

        def lean(x: Tensor, level: Level) -> Estimate:
            rho = self.weight * (max(self.measurement.deviation, self.least) / level.ratio) ** 2
            return denoise(x, level).with_x0(lambda x0: x0 + self.blend * (operator.prox(x0, rho, y) - x0), x, level)

        return lean
