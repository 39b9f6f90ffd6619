"""An adaptive solver of dy/dt = f(t, y): the fifth-order pair of Dormand and Prince with its fourth-order error.

A family of embedded Runge-Kutta formulae, Dormand and Prince 1980, J. Comp. Appl. Math. 6(1); steps by the usual rule of
Solving Ordinary Differential Equations I, Hairer et al. 1993, section II.4 (what scipy calls RK45).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm_pipe.errors import NumericalError

PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
# Each row gives the place of the next stage; the last one is the fifth-order result, where the next step's first slope lies.
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
MOST_TRIES = 2000


def integrate(f: Callable[[float, Tensor], Tensor], y: Tensor, start: float, end: float, tolerance: float = 1e-5) -> Tensor:
    """y at `end` of y [B,...] at `start`, on either side of it. f(t, y) is asked for t between the two, both included.

    tolerance: of one step's error, absolute and relative to y, as a root mean square in the worst image. Raises NumericalError
    where no step is small enough.
    """
    t, h, slopes = start, end - start, [f(start, y)]
    for _ in range(MOST_TRIES):
        last = abs(h) >= abs(end - t)
        h = end - t if last else h
        slopes = slopes[:1]
        for row, part in zip(STAGES, PLACES[1:], strict=True):
            trial = y + h * _mix(row, slopes)
            slopes.append(f(end if last and part == 1 else t + part * h, trial))
        off = h * _mix(ERROR, slopes) / (tolerance + tolerance * torch.maximum(y.abs(), trial.abs()))
        error = float(off.flatten(1).square().mean(1).sqrt().max())
        if error <= 1:
            if last:
                return trial
            t, y, slopes = t + h, trial, slopes[-1:]
        factor = 0.9 * error**-0.2 if 0 < error < float("inf") else 10.0 if error == 0 else 0.1
        h *= min(10.0, max(0.1, factor))
        if not abs(h) > 1e-12 * abs(end - start):
            break
    raise NumericalError(f"the ODE could not be solved to {tolerance:g} beyond {t:.6g}; give a larger tolerance")


def _mix(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for w, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + w * slope
    return total
