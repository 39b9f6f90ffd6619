"""The denoising objective: draw a level, mix, ask the model, compare with its prediction's target under a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm_pipe import strict
from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError, unknown
from ldm_pipe.level import Level
from ldm_pipe.model import Model
from train.objectives.hybrid import bound, table_of
from train.objectives.levels import LEVELS, Levels, LogitNormal
from train.objectives.uncertainty import LogVariance
from train.objectives.weights import WEIGHTS, Constant, Weight, slope2


class Terms(NamedTuple):
    """Per sample, [B]: what is minimised, the plain squared error of the output, and where the level lies, u in 0..1."""

    loss: Tensor
    error: Tensor
    u: Tensor


@dataclass(frozen=True)
class Objective:
    """How a denoiser is trained, whatever it predicts.

    levels, weight: a name, or a table with a name and fields. huber: 0 is the squared error, above it the pseudo-Huber loss
    2 c (sqrt(e^2 + c^2) - c), which is e^2 for errors far below c (Improved Techniques for Training Consistency Models, Song
    and Dhariwal 2023, arXiv 2310.14189, eq. 7). offset: deviation of one shared value per channel added to the noise
    (N. Guttenberg, "Diffusion with Offset Noise", 2023). perturb: deviation of noise added to the input alone (Input
    Perturbation Reduces Exposure Bias in Diffusion Models, Ning et al. 2023, arXiv 2301.11706, algorithm 2; there 0.1).
    hybrid: weight of the variational bound that a learned variance is trained with (Nichol and Dhariwal 2021: 0.001).
    """

    levels: Levels = field(default_factory=LogitNormal)
    weight: Weight = field(default_factory=Constant)
    huber: float = 0.0
    offset: float = 0.0
    perturb: float = 0.0
    hybrid: float = 0.0

    def __post_init__(self) -> None:
        for name in ("huber", "offset", "perturb", "hybrid"):
            if getattr(self, name) < 0:
                raise UsageError(f"objective: {name} is {getattr(self, name):g}; it takes 0 or more")

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Everything random that one sample needs, for latents of `shape` [C,h,w]; the same rng gives the same draws."""
        draws: dict[str, np.ndarray] = {
            "normal": np.float32(rng.standard_normal()),  # type: ignore[dict-item]
            "noise": rng.standard_normal(shape, dtype=np.float32),
        }
        if self.offset:
            draws["offset"] = rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        if self.perturb:
            draws["perturb"] = rng.standard_normal(shape, dtype=np.float32)
        return draws

    def check(self, model: Model) -> None:
        """Raise UsageError where the model cannot be trained like this."""
        last = model.path.level(model.path.last)
        if model.prediction.name == "eps" and last.alpha == 0 and model.path.discrete:
            raise UsageError("an eps network learns nothing of a table that ends at zero SNR; predict v, x0 or flow")
        if self.hybrid:
            table_of(model.path)

    def __call__(
        self,
        model: Model,
        x0: Tensor,
        draws: Mapping[str, Tensor],
        cond: Cond,
        mask: Tensor | None = None,
        uncertainty: LogVariance | None = None,
    ) -> Terms:
        """x0 [B,C,h,w], draws as `draw` gives them, mask [B,1,h,w] 0..1 (1 counts; the mean is over the whole image)."""
        level = self.levels(draws["normal"], model.path)
        noise = draws["noise"] + self.offset * draws["offset"] if self.offset else draws["noise"]
        mixed = noise + self.perturb * draws["perturb"] if self.perturb else noise
        inside, out, own = model.raw(level.mix(x0, mixed), level, cond)
        out, part = out.chunk(2, dim=1) if out.shape[1] == 2 * x0.shape[1] else (out, None)
        clean = x0 / model.path.data_std
        difference = out.float() - model.prediction.target(clean, noise, own)
        error = _averaged(difference.square(), mask)
        lost = _averaged(_huber(difference, self.huber), mask) if self.huber else error
        loss = lost * self.weight(_snr(own), slope2(model.prediction, own))
        if uncertainty is not None:
            loss = uncertainty(loss, _snr(own))
        if self.hybrid:
            loss = loss + self._bound(model, (inside, out, part), clean, own)
        return Terms(loss, error.detach(), torch.as_tensor(own.u).flatten())

    def _bound(self, model: Model, seen: tuple[Tensor, Tensor, Tensor | None], clean: Tensor, own: Level) -> Tensor:
        """hybrid * T * the bound of the step: an estimate of hybrid times the whole bound."""
        inside, out, part = seen
        if part is None:
            raise UsageError("objective: hybrid needs a network with twice the channels, the second half its variance")
        table = table_of(model.path)
        time = torch.as_tensor(model.path.time(own)).flatten().round()
        guess = model.prediction.x0(inside, out.float(), own)
        return self.hybrid * len(table) * bound(table, time, inside, clean, guess, part.float())


def read(table: Mapping[str, Any], where: str = "objective") -> Objective:
    """An Objective from a recipe's table. Raises UsageError naming the nearest name or field."""
    fields = dict(table)
    for part, known in (("levels", LEVELS), ("weight", WEIGHTS)):
        if part in fields:
            fields[part] = _named(fields[part], known, part, where)
    return strict.build(Objective, fields, where)


def _named(value: Any, known: Mapping[str, type], kind: str, where: str) -> Any:
    rest = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = str(rest.pop("name", ""))
    if name not in known:
        raise UsageError(f"{where}: " + unknown(kind, name, known))
    return strict.build(known[name], rest, f"{where}.{kind} {name}")


def _snr(own: Level) -> Tensor:
    return torch.as_tensor(own.alpha / own.sigma).square().flatten()


def _averaged(values: Tensor, mask: Tensor | None) -> Tensor:
    return (values if mask is None else values * mask).mean(dim=(1, 2, 3))


def _huber(difference: Tensor, c: float) -> Tensor:
    return 2 * c * ((difference.square() + c * c).sqrt() - c)
