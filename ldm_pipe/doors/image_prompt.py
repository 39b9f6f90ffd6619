"""`--image-prompt FILE --noise-level N`: a picture beside the words, for models that were trained with both (unCLIP).

ImagePrompt(20).applied(pipe, pipe.plan("a fox"), picture)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ldm_pipe.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm_pipe.cond import Cond
    from ldm_pipe.model import CondAt
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan

WITHOUT = ("uncond", "image")  # branches under the negative prompt, which are told no picture


@dataclass(frozen=True)
class ImagePrompt:
    """noise_level: how much noise is on the picture's vector, from 0, its closest variations, to the model's most (999), which
    share little with it."""

    noise_level: int = 0

    def __post_init__(self) -> None:
        if self.noise_level < 0:
            raise UsageError(f"--noise-level takes whole numbers from 0, got {self.noise_level}")

    def applied(self, pipe: Pipeline, whole: Plan, picture: Image) -> Plan:
        """The plan whose conditions hold the picture, each image's under noise of its own seed. Raises UsageError where the
        model takes no picture or no such level."""
        from ldm_pipe.image import digest
        from ldm_pipe.noise import Noise
        from ldm_pipe.plan import conditions

        vectors = pipe.bundle.vectors
        if vectors is None:
            other = 'there is --control "ip_adapter(FILE)" --control-image FILE'
            raise UsageError(f"--image-prompt goes with a model that was trained with pictures (unCLIP); for others {other}")
        noise = Noise(whole.seeds, (vectors.width,), pipe.device).at(0)("picture")
        told = vectors([picture], noise, self.noise_level)
        none = told.new_zeros(told.shape)
        conds = {**conditions(pipe.bundle, whole), **whole.conds}
        shown = {n: _shown(cond, none if n in WITHOUT else told) for n, cond in conds.items()}
        sources = {**whole.recorded.get("sources", {}), "image_prompt": digest(picture)}
        return replace(whole, conds=shown, recorded={**whole.recorded, "sources": sources, "image_prompt": asdict(self)})


def _shown(cond: Cond | CondAt, told: Tensor) -> Cond | CondAt:
    """The condition with the picture, at every level where it is a function of it."""
    if callable(cond):
        at = cond
        return lambda level: _with(at(level), told)
    return _with(cond, told)


def _with(cond: Cond, told: Tensor) -> Cond:
    return replace(cond, extras={**cond.extras, "picture": told})
