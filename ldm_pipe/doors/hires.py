"""`--hires 2x`: an image at the model's own size first, then enlarged and drawn over at the larger one.

What is where is settled at the size of training, the detail at the larger: SDEdit (Meng et al. 2021, arXiv 2108.01073) of the
enlarged picture. Both passes run under the same patches and controls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ldm_pipe import strict
from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan


@dataclass(frozen=True)
class Hires:
    """factor: of the sides, above 1 to 8. strength: the share of the steps that the second pass runs, above 0 to 1."""

    factor: float
    strength: float = 0.5

    def __post_init__(self) -> None:
        if not (1 < self.factor <= 8 and 0 < self.strength <= 1):
            raise UsageError(f"hires: a factor above 1 to 8 and a strength above 0 to 1, got {self.factor}, {self.strength}")

    @classmethod
    def of(cls, text: str | None, fields: Mapping[str, Any]) -> Hires | None:
        """From "2x" and the fields that --set gives; None where it is not asked for."""
        if text is None:
            if fields:
                raise UsageError("--set hires... goes with --hires 2x")
            return None
        found = re.fullmatch(r"\s*(\d{1,2}(?:\.\d{1,6})?)\s*x?\s*", text)
        if found is None or "factor" in fields:
            raise UsageError(f"--hires {text[:40]!r} is not of the form 2x or 1.5x")
        return strict.build(cls, {**fields, "factor": float(found[1])}, "hires")

    def applied(self, pipe: Pipeline, whole: Plan, dress: Callable[[Plan], Plan]) -> Plan:
        """The plan of the second pass; the first is run here. dress: what both passes run under."""
        from PIL.Image import Resampling

        from ldm_pipe.image import to_tensor
        from ldm_pipe.levels import tail
        from ldm_pipe.noise import Noise

        if whole.source is not None or whole.start is not None:
            raise UsageError("--hires goes with a prompt alone, not with a picture to start from")
        factor = pipe.bundle.codec.factor
        height, width = (round(side * self.factor) for side in whole.shape[1:])
        pictures = [picture for out in pipe.run(dress(whole)) for picture in out.images]
        large = [picture.resize((width * factor, height * factor), Resampling.LANCZOS) for picture in pictures]
        x0 = _encoded(pipe, to_tensor(large), whole.given.batch_size)
        shape, levels = (whole.shape[0], height, width), tuple(tail(whole.levels, self.strength))
        start = levels[0].mix(x0, Noise(whole.seeds, shape, pipe.device).start())
        recorded = {**whole.recorded, "hires": asdict(self)}
        return dress(replace(whole, levels=levels, shape=shape, start=start, recorded=recorded, paced=whole.levels))


def _encoded(pipe: Pipeline, images: Any, size: int) -> Any:
    import torch

    with torch.no_grad():
        return torch.cat([pipe.bundle.codec.encode(part.to(pipe.device)) for part in images.split(size)])
