"""Any linear operator, by its matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.restore.operator import Linear
from ldm_pipe.restore.spectrum import Spectrum, cut


@dataclass(frozen=True, eq=False)
class Matrix(Linear):
    """A matrix [M,D] on images of shape (C, H, W), D = C * H * W: [B,C,H,W] -> [B,M].

    Raises UsageError where the sizes do not fit.
    """

    matrix: Tensor
    shape: tuple[int, ...]
    _parts: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[1] != torch.Size(self.shape).numel():
            raise UsageError(f"a matrix of {list(self.matrix.shape)} does not fit images of {list(self.shape)}")
        u, s, vt = torch.linalg.svd(self.matrix)
        object.__setattr__(self, "_parts", (u[:, : len(s)], F.pad(cut(s), (0, len(vt) - len(s))), vt))

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that was given."""
        return self.shape

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """Coefficients [B,D]."""
        u, s, vt = (t.to(like) for t in self._parts)
        k = u.shape[1]
        return Spectrum(
            s,
            lambda c: c[:, :k] @ u.T,
            lambda y: F.pad(y @ u, (0, len(vt) - k)),
            lambda c: (c @ vt).reshape(-1, *shape),
            lambda x: x.flatten(1) @ vt.T,
        )
