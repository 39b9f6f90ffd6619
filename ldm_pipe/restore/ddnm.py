"""Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model, Wang et al. 2022, arXiv 2212.00490, eq. 11-13.

A Guide for noiseless measurements. The kernel that goes with it is `renoise(eta=0.85)`, 100 steps, with the network's own
noise kept: recomputing it from the corrected x0 is another method.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.restore.operator import Measurement


@dataclass(frozen=True)
class DDNM:
    """Replace what A sees of x0 by the data: x0 - A+ (A x0 - y). Every x0 fits y exactly; the noise stays the network's.

    Where the operator has no spectrum, one Gauss-Newton step takes the place of the projection.
    """

    measurement: Measurement

    def __call__(self, denoise: Denoiser) -> Denoiser:
        """The denoiser whose x0 fits the data."""
        operator, y = self.measurement.operator, self.measurement.y

        def fit(x: Tensor, level: Level) -> Estimate:
            return denoise(x, level).with_x0(lambda x0: operator.prox(x0, 0.0, y), x, level, keep_noise=True)

        return fit
