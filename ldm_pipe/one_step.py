"""What a network predicts, told from its answers to noise and to plain colours, where a file says nothing or the wrong thing.

At pure noise x = n a trained network that predicts the noise, or the flow n - x0, gives n back; one that predicts x0 or v =
alpha n - sigma x0 gives what it knows of x0, nothing of n. Little noise on a picture of one colour separates the rest: the
answer is a n + b x0, with (a, b) near (1, 0) for the noise, (1, -1) for the flow, (alpha, -sigma) for v and (0, 1) for x0 (the
targets of `prediction`, by least squares over all values). Most of an untrained network's answer is no sum of the two, and then
nothing is said.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.level import Level
from ldm_pipe.model import Model
from ldm_pipe.prediction import PREDICTIONS

ALL = frozenset(PREDICTIONS)
NOISE, REST = frozenset({"eps", "flow"}), frozenset({"v", "x0"})
COLOURS = ((1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (-0.7, -0.3, 0.8), (0.8, -0.6, -0.6))  # RGB in -1..1
LOW, LOWEST = 0.2, 0.05  # u, the share of noise, at which colours are shown
EXPLAINED = 0.5  # share of an answer that must be a n + b x0


class Answer(NamedTuple):
    """The least-squares fit a n + b x0 of an output, and the share of its square that this explains."""

    noise: float
    clean: float
    explained: float


def colours(side: int) -> Tensor:
    """Pictures of one colour each, [4,3,side,side] in -1..1."""
    return torch.tensor(COLOURS)[:, :, None, None].expand(-1, -1, side, side)


@torch.no_grad()
def candidates(model: Model, cond: Cond, x0: Tensor) -> frozenset[str]:
    """The predictions that the network's answers allow: all of them where nothing can be told.

    cond: an empty condition for as many rows as x0 [B,C,h,w] has, latents of `colours`. Three evaluations; what the model says
    of its prediction is not used.
    """
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    path = model.path
    none = _answer(model, cond, path.level(path.last), torch.zeros_like(x0), noise)
    low, lowest = (_answer(model, cond, Level(1 - u, u * path.data_std), x0, noise) for u in (LOW, LOWEST))
    sees = low.explained > EXPLAINED and low.noise > 0.5
    if none.noise > 0.7 and none.explained > EXPLAINED:
        split = "flow" if low.clean < -0.5 else "eps" if low.clean > -0.25 else ""
        return frozenset({split}) if sees and split else NOISE
    if abs(none.noise) > 0.3:
        return ALL
    if sees and abs(low.clean) < 0.6:
        return frozenset({"v"})
    shows = all(a.explained > EXPLAINED and abs(a.clean - 1) < 0.3 and a.noise < 0.4 for a in (low, lowest))
    return frozenset({"x0"}) if shows else ALL


def _answer(model: Model, cond: Cond, level: Level, x0: Tensor, noise: Tensor) -> Answer:
    """What the network makes of x0 under noise, as a sum of the two. (It sees x0 / data_std, and so does the fit.)"""
    _, out, _ = model.raw(level.mix(x0, noise), level, cond)
    basis = torch.stack([noise.flatten(), x0.flatten() / model.path.data_std], 1).double()
    out = out[:, : x0.shape[1]].flatten().double()
    a, b = (torch.linalg.pinv(basis) @ out).tolist()
    left = (out - basis @ out.new_tensor([a, b])).square().sum() / out.square().sum().clamp_min(1e-12)
    return Answer(a, b, float(1 - left))


def contradiction(declared: str, found: frozenset[str], where: str) -> str:
    """The sentence for the user where a declared prediction is none of those that the answers allow; "" else."""
    if declared in found:
        return ""
    like = " or ".join(sorted(found))
    return f"{where} says that the network predicts {declared}; its answers to noise and to plain colours are those of {like}"
