"""Averages of any length, chosen after training: two power-function averages are kept, snapshots of them combined.

Analyzing and Improving the Training Dynamics of Diffusion Models, Karras et al. 2023, arXiv 2312.02696, section 3 and
appendix C. A width sigma_rel is the standard deviation of an average's profile over the training so far, as a share of it:
0.05 forgets all but the last tenth or so. Snapshots lie in `<output>/averages/<step>-<width>.safetensors` and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ldm_pipe import files
from ldm_pipe.errors import UsageError


class Snapshot(NamedTuple):
    """An average of one width, taken after `step` steps."""

    step: int
    width: float
    file: Path


def gamma_of(width: float) -> float:
    """The exponent of the profile p(tau) ~ tau^gamma on 0..t with standard deviation width * t; width in 0..0.288.

    Its variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (eq. 127): the root of a polynomial of the third degree.
    """
    if not 0 < width < 12**-0.5:
        raise UsageError(f"the width of an average is {width:g}; it takes a number between 0 and 0.288")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


class PowerAverage:
    """sum over tau of the weights times tau^gamma, normalised: decay (1 - 1/t)^(gamma + 1) at step t (eq. 2)."""

    def __init__(self, net: nn.Module, width: float) -> None:
        self.width, self.gamma = width, gamma_of(width)
        self.shadow: dict[str, Tensor] = {n: t.detach().clone() for n, t in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, counted from 0."""
        decay = (1 - 1 / (step + 1)) ** (self.gamma + 1)
        state = net.state_dict()
        moving = [n for n, t in state.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.shadow[n] for n in moving], [state[n] for n in moving], 1 - decay)

    def write(self, folder: Path, step: int) -> None:
        """A snapshot."""
        state = {n: t.detach().cpu().contiguous() for n, t in self.shadow.items()}
        files.write(folder / f"{step:06d}-{self.width:.3f}.safetensors", save(state), replace=True)


def snapshots(folder: Path, upto: int | None = None) -> list[Snapshot]:
    """The snapshots in a folder, by step; those of at most `upto` steps."""
    found = []
    for file in sorted(folder.glob("*-*.safetensors")):
        step, _, width = file.stem.partition("-")
        if step.isdigit() and (upto is None or int(step) <= upto):
            found.append(Snapshot(int(step), float(width), file))
    return found


def coefficients(kept: Sequence[tuple[int, float]], step: int, width: float) -> np.ndarray:
    """The combination of averages (step, width) whose profile is nearest to that of `width` at `step`: [N], with sum 1.

    Algorithm 3; the sum is all but 1 by itself, and exactly 1 is what keeps the size of weights that do not move.
    """
    target = gamma_of(width)
    known = [(s, gamma_of(w)) for s, w in kept]
    gram = np.array([[_product(*a, *b) for b in known] for a in known])
    right = np.array([_product(*a, step, target) for a in known])
    shares = np.linalg.lstsq(gram, right, rcond=1e-12)[0]
    return shares / shares.sum()


def reconstruct(folder: Path, width: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of a width after `step` steps (None: the last snapshot). Raises UsageError where there are no snapshots."""
    kept = snapshots(folder, step)
    if not kept:
        raise UsageError(f"{str(folder)!r} holds no snapshots; job.post_hoc = [0.05, 0.1] makes them")
    shares = coefficients([(s.step, s.width) for s in kept], step or kept[-1].step, width)
    total: dict[str, Tensor] = {}
    for share, snapshot in zip(shares, kept, strict=True):
        for name, tensor in load_file(snapshot.file).items():
            if tensor.is_floating_point():
                total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + float(share) * tensor.double()
            else:
                total[name] = tensor
    return {n: t.float() if t.is_floating_point() else t for n, t in total.items()}


def _product(step: int, gamma: float, other: int, delta: float) -> float:
    """The integral of two profiles (gamma + 1) tau^gamma / step^(gamma + 1) over what they share (eq. 150)."""
    log = np.log
    whole = gamma + delta + 1
    both = whole * log(min(step, other)) - (gamma + 1) * log(step) - (delta + 1) * log(other)
    return float((gamma + 1) * (delta + 1) / whole * np.exp(both))
