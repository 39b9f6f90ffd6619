"""Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided Diffusion Models, Miyake et al. 2023, arXiv
2305.16807.

Null-text inversion without its optimisation: what it finds for the other branch is nearly the source prompt itself, with which
guidance cancels in the source at any scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ldm_pipe.editing.invert import Inverse, Remake, ascend


@dataclass(frozen=True)
class NegativePrompt:
    """Inversion without guidance; then the source prompt is the negative one, and guidance leaves the source alone.

    corrections: more evaluations of every step, until it comes back.
    """

    sampler: ClassVar[tuple[str, dict[str, Any]]] = ("ddim", {})

    corrections: int = 5

    def __call__(self, picture: Tensor, run: Remake) -> Inverse:
        """1 + corrections evaluations of every step, and the run itself."""
        x = ascend(run.plain, picture, run.levels, run.sampler, self.corrections)[0]
        return run.inverse(picture, x, conds={"uncond": run.branches.conds["cond"]})
