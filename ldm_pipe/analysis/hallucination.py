"""Understanding Hallucinations in Diffusion Models through Mode Interpolation, Aithal et al. 2024, arXiv 2406.09358, section 5.

Between two modes a smooth network makes samples that the data do not hold; there its estimate of the clean image wavers at the
end of the walk. The score is the variance of x0 over the last levels. They are levels of little noise, not the last of a few
steps: a short walk needs a tail of more (`dense_tail`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.levels import trailing
from ldm_pipe.walk import Step

FINE, OF = 10, 1000  # the levels over which the score is taken: the last ten of a thousand


def scores(steps: Iterable[Step], below: float) -> Tensor:
    """[B]: the variance of x0 over the steps whose noise u is at most `below`, averaged over the values of an image. Raises
    UsageError where fewer than three steps lie there."""
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for step in steps:  # Welford 1962, so that the steps need not be kept
        if float(step.here.u) <= below:
            count, x0 = count + 1, step.estimate.x0.double()
            delta = x0 - mean
            mean = mean + delta / count
            square = square + delta * (x0 - mean)
    if count < 3:
        raise UsageError(f"{count} step(s) have a noise of u <= {below}; the score needs 3, from more steps or a dense tail")
    return (square / count).flatten(1).mean(1)


def keep(found: Tensor, share: float = 0.96) -> Tensor:
    """[B] True for the share of the samples with the lowest scores."""
    if not 0 < share <= 1:
        raise UsageError(f"the share that is kept is {share}; it takes a number above 0, at most 1")
    return found <= torch.quantile(found, share)


def dense_tail(levels: Sequence[Level], tail: Sequence[Level]) -> list[Level]:
    """A walk that goes on, below the noisiest level of a tail, in the steps of the tail."""
    return [level for level in levels if float(level.u) > float(tail[0].u)] + list(tail)


def fine_end(path: Path) -> list[Level]:
    """The tail of a walk over which the score finds most: the last ten of a thousand steps, as in the official code. Over the
    last hundred it finds next to nothing, so that more noise is no substitute."""
    return trailing(path, OF)[-FINE - 1 :]
