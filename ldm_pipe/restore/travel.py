"""Time travel for any sampler: Wang et al. 2022 (DDNM), arXiv 2212.00490, section 3.3, algorithm 2.

A rise in the levels is a draw from q(x_t | x_s) of the x that was reached, as in the paper (the official code noises x0 anew).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ldm_pipe.level import Level
from ldm_pipe.levels import jumps
from ldm_pipe.walk import Sampler, Wrapping


@dataclass(frozen=True)
class Travel(Wrapping):
    """Another sampler that also goes up, over levels such as those of `levels.jumps`; on falling ones it is itself.

    length, times: of the jumps (the paper's travel_length and travel_repeat).
    """

    travels: ClassVar[bool] = True  # type: ignore[misc]

    sampler: Sampler
    length: int = 1
    times: int = 1

    def walk(self, levels: Sequence[Level]) -> list[Level]:
        """With the jumps."""
        return jumps(self.sampler.walk(levels), self.length, self.times)
