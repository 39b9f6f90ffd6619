"""Your Diffusion Model is Secretly a Zero-Shot Classifier, Li et al. 2023, arXiv 2303.16203, section 3 and algorithm 1-2.

The class under which the network tells the noise best: argmin over c of the mean of |noise - noise(x_t, c)|^2, the same levels
and draws for every class. Stages drop the classes that lie behind before more draws are spent on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser
from ldm_pipe.noise import Noise


class Verdict(NamedTuple):
    """best: the name of the class, for each image. errors: [B,K] mean squared errors over the draws that a class was given,
    names in order. evaluations: images that the network saw."""

    best: tuple[str, ...]
    errors: Tensor
    evaluations: int


@torch.no_grad()
def classify(
    classes: Mapping[str, Denoiser], x0: Tensor, levels: Sequence[Level], noise: Noise, stages: Sequence[tuple[int, int]] = ()
) -> Verdict:
    """The class of every image x0 [B,C,H,W].

    levels: of the draws, evenly spaced over the path for a uniform prior; noise: for B images. stages: (draws so far, classes
    that stay), such as ((50, 5), (500, 1)); none: every class sees all levels. The draws of a stage are spread over all levels.
    """
    names, count = tuple(classes), len(levels)
    stages = tuple(stages) or ((count, 1),)
    if [n for n, _ in stages] != sorted({n for n, _ in stages}) or not 0 < stages[-1][0] <= count:
        raise UsageError(f"the stages of a classifier rise to at most {count} draws, the number of levels; got {list(stages)}")
    sums = torch.zeros(len(x0), len(names), dtype=torch.float64)
    draws = torch.zeros_like(sums)
    alive = torch.ones_like(sums, dtype=torch.bool)
    done = evaluations = 0
    order = _spread(count)
    for until, keep in stages:
        for k in order[done:until]:
            drawn = noise.at(k)("classifier")
            x = levels[k].mix(x0, drawn)
            for c, name in enumerate(names):
                rows = alive[:, c].nonzero()[:, 0]
                if len(rows):
                    found = classes[name](x[rows], levels[k]).noise
                    sums[rows, c] += (found - drawn[rows]).double().square().flatten(1).mean(1).cpu()
                    draws[rows, c] += 1
                    evaluations += len(rows)
        done = until
        means = torch.where(alive, sums / draws.clamp_min(1), torch.inf)
        alive &= torch.zeros_like(alive).scatter(1, means.argsort(1)[:, :keep], True)
    errors = sums / draws.clamp_min(1)
    best = torch.where(alive, errors, torch.inf).argmin(1)
    return Verdict(tuple(names[int(k)] for k in best), errors, evaluations)


def _spread(count: int) -> list[int]:
    """Every number below count once, so that any first part of them is spread evenly: bits reversed (van der Corput 1935)."""
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda k: int(f"{k:0{bits}b}"[::-1], 2))
