"""Any operator, by a function that autograd can follow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm_pipe.restore.operator import Operator
from ldm_pipe.restore.spectrum import Map


@dataclass(frozen=True)
class Function(Operator):
    """A differentiable function of images [B,C,H,W] that treats every image of a batch on its own."""

    function: Map

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.function(x)
