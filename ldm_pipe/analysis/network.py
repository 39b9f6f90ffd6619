"""A denoiser as a raw network, so that what is exact can be asked through the whole stack: Model, branches, rules, samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.model import Denoiser
from ldm_pipe.prediction import Prediction


@dataclass(frozen=True, eq=False)
class ExactNetwork:
    """A Network on `path` that predicts as `prediction` does: Model(it, path, prediction) is the denoiser again.

    denoisers: what it knows under each label, closed forms that take levels of [B,1,1,1] tensors. The label of a row is
    cond.extras["label"] ([B] whole numbers, an index into `denoisers`), 0 where there is none.
    """

    denoisers: Sequence[Denoiser]
    path: Path
    prediction: Prediction

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """x: [B,...] on the path at time: [B] or [1]. Raises UsageError for a label without a denoiser."""
        labels = cond.extras.get("label", torch.zeros(len(x))).to(x.device)
        if bool(((labels < 0) | (labels >= len(self.denoisers))).any()):
            raise UsageError(f"labels are 0 to {len(self.denoisers) - 1}, got {labels.tolist()}")
        out, time = torch.empty_like(x), time.expand(len(x))
        for label in sorted(set(labels.tolist())):
            rows = labels == label
            out[rows] = self._output(self.denoisers[int(label)], x[rows], time[rows])
        return out

    def _output(self, denoise: Denoiser, x: Tensor, time: Tensor) -> Tensor:
        own = [self.path.rescale(self.path.level(t))[1] for t in time.tolist()]
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (torch.tensor(side, dtype=torch.float64).reshape(shape) for side in zip(*own, strict=True))
        std = self.path.data_std  # the network's clean image is x0 / std
        estimate = denoise(x, Level(alpha / std, sigma))
        return self.prediction.target(estimate.x0 / std, estimate.noise, Level(alpha, sigma)).to(x)
