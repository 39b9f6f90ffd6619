"""Blur: circular, by the Fourier transform; and with zeros beyond the border, row by row and column by column."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Axis, Spectrum, axis, cut, separable

Kernel = Literal["gaussian", "uniform"]


@dataclass(frozen=True, eq=False)
class Blur(Linear):
    """Circular blur: [B,C,H,W] -> the same, the picture continued beyond each border from the opposite one.

    kernel: "gaussian" of standard deviation `width` in pixels, "uniform" over `width` pixels (odd) squared, or a tensor [h,w]
    of odd sides, of any shape (motion blur). Diagonal under the Fourier transform; coefficients are the Hartley transform's,
    which is real (A More Symmetrical Fourier Analysis, Hartley 1942, Proc. IRE 30(3)), singular values the kernel's gains.
    """

    kernel: Tensor | Kernel = "gaussian"
    width: float = 3.0

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """A = F* k F = U |k| V', with V the Hartley transform and U = F* (k / |k|) F V."""
        gain = torch.fft.fft2(self._placed(*shape[1:]))
        s = cut(gain.abs())
        turn = torch.where(s > 0, gain / gain.abs().clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        turn = turn.to(like.device, torch.promote_types(like.dtype, torch.complex64))

        def rotated(x: Tensor, by: Tensor) -> Tensor:
            return torch.fft.ifft2(by * torch.fft.fft2(x)).real

        return Spectrum(
            s.to(like), lambda c: rotated(_hartley(c), turn), lambda y: _hartley(rotated(y, turn.conj())), _hartley, _hartley
        )

    def _placed(self, height: int, width: int) -> Tensor:
        """The kernel as a picture [H,W], its middle at the corner, wrapped around."""
        if isinstance(self.kernel, Tensor):
            kernel = self.kernel.detach().double().cpu()
            if kernel.ndim != 2 or not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
                raise UsageError(f"a kernel has two odd sides, got {list(kernel.shape)}")
        else:
            line = _profile(self.kernel, self.width)
            kernel = torch.outer(line, line)
        placed = torch.zeros(height, width, dtype=torch.float64)
        down = (torch.arange(kernel.shape[0]) - kernel.shape[0] // 2) % height
        right = (torch.arange(kernel.shape[1]) - kernel.shape[1] // 2) % width
        return placed.index_put((down[:, None], right), kernel, accumulate=True)


@dataclass(frozen=True)
class BlurZero(Linear):
    """Blur with zeros beyond the border: [B,C,H,W] -> the same. kernel and width as for `blur`, separable ones only.

    Denoising Diffusion Restoration Models, Kawar et al. 2022, arXiv 2201.11793, appendix (separable blur).
    """

    kernel: Kernel = "gaussian"
    width: float = 3.0

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Rows and columns on their own."""
        return separable(_axis(self.kernel, self.width, shape[1]), _axis(self.kernel, self.width, shape[2]), like)


def _hartley(x: Tensor) -> Tensor:
    f = torch.fft.fft2(x, norm="ortho")
    return f.real - f.imag


def _profile(kernel: Kernel, width: float) -> Tensor:
    """A row of the kernel, of odd length and sum 1."""
    if not 0 < width < 1000 or (kernel == "uniform" and width % 2 != 1):
        raise UsageError(f"blur({kernel}) takes a width above 0{', odd' if kernel == 'uniform' else ''}, got {width:g}")
    reach = int(width) // 2 if kernel == "uniform" else math.ceil(4 * width)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.ones_like(places) if kernel == "uniform" else torch.exp(-0.5 * (places / width) ** 2)
    return weights / weights.sum()


@functools.lru_cache(8)
def _axis(kernel: Kernel, width: float, size: int) -> Axis:
    line = _profile(kernel, width)
    offset = torch.arange(size)[:, None] - torch.arange(size) + len(line) // 2
    inside = (offset >= 0) & (offset < len(line))
    return axis(torch.where(inside, line[offset.clamp(0, len(line) - 1)], 0.0))
