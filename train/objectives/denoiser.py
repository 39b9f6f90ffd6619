"""The module that diffusion jobs train: the denoising loss of a batch, and what is frozen around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.offload import modules
from train.objectives.objective import Objective
from train.objectives.repa import Alignment, Teacher, width_of
from train.objectives.uncertainty import LogVariance


class DenoiserLoss(nn.Module):
    """A bundle's network under an objective. Only what is trained is a part of it, so checkpoints hold nothing else.

    text: the text encoders that are trained along, by the names of their folders; else prompts come encoded, or as ids that the
    frozen ones encode. `teacher` may be set to align a site of the network with a frozen encoder (REPA).
    """

    teacher: Teacher | None

    def __init__(
        self,
        bundle: Any,
        objective: Objective,
        text: Mapping[str, nn.Module] | None = None,
        uncertainty: LogVariance | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.uncertainty = bundle.model, objective, uncertainty
        self.text = nn.ModuleDict(text or {}).eval()
        self.teacher = None
        self.frozen = {"codec": bundle.codec, "text": bundle.text}  # in a mapping: no modules of this one

    def train(self, mode: bool = True) -> DenoiserLoss:
        """Dropout stays off: it would draw from torch's own generator, whose state no checkpoint holds."""
        super().train(False)
        return self

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """-> loss; error: the plain squared one; each, u: [B]."""
        cond = self._cond(batch)
        x0 = batch["x0"] if "x0" in batch else self._latents(batch["images"])
        given = (self.model, x0, batch, cond, batch.get("mask"), self.uncertainty)
        if self.teacher is None:  # and no `with`: job.compile does not get through one that gives a list
            terms = self.objective(*given)
            return {"loss": terms.loss.mean(), "error": terms.error.mean(), "each": terms.loss.detach(), "u": terms.u}
        with self.teacher.head.watching(self.model.network) as seen:
            terms = self.objective(*given)
        aligned = self.teacher(seen[0], batch["images"])
        each = terms.loss + aligned
        found = {"loss": each.mean(), "error": terms.error.mean(), "aligned": aligned.mean()}
        return {**found, "each": each.detach(), "u": terms.u}

    def width_at(self, site: str, batch: dict[str, Tensor]) -> int:
        """Channels of what a module of the network puts out, found by one evaluation."""
        with torch.no_grad(), Alignment(site, 1, 1).watching(self.model.network) as seen:
            self(batch)
        return width_of(seen[0])

    def _cond(self, batch: dict[str, Tensor]) -> Cond:
        """The text, and in the extras whatever else a network may want to know (SDXL: the sizes of the cut)."""
        named, ids = _those(batch, "text_"), _those(batch, "ids_")
        fields: dict[str, Any] = {n: named.pop(n) for n in ("tokens", "pooled", "mask") if n in named}
        if "channels" in batch:
            fields["channels"] = batch["channels"]
        cond = self._encoded(ids) if ids else Cond()
        return replace(cond, **fields, extras={**cond.extras, **named})

    def _encoded(self, ids: dict[str, Tensor]) -> Cond:
        device = next(iter(ids.values())).device
        for encoder in modules(self.frozen["text"]):
            if all(encoder is not own for own in self.text.values()):
                encoder.to(device, torch.float32)
        found: Cond
        with torch.set_grad_enabled(bool(self.text) and torch.is_grad_enabled()):
            found = self.frozen["text"].encode(ids)
        return found

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        self.frozen["codec"] = self.frozen["codec"].to(images.device, torch.float32)
        with torch.autocast(images.device.type, enabled=False):  # half precision overflows in some codecs
            return self.frozen["codec"].encode(images)


def _those(batch: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    return {n.removeprefix(head): t for n, t in batch.items() if n.startswith(head)}
