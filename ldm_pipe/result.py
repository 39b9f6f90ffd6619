"""What a run gives back: images with their seeds, prompts, latents and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm_pipe.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Output:
    """What a call returns: one entry per image, prompts in order, each prompt's images together.

    latents: [N,C,h,w]. evaluations: how many images the network saw, per branch. notices: sentences for the user. places:
    (size of the batch an image was computed in, its row there). tiles: that each was decoded in, their side in latent pixels, 0
    for none. recorded: what else their recipes say. walked: steps that ran.
    """

    images: list[Image]
    latents: Tensor
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    settings: Settings
    evaluations: Counter[str]
    notices: tuple[str, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    walked: int = 0
    tiles: tuple[int, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Output]) -> Output:
        """The outputs of several batches as one."""
        return cls(
            [i for part in parts for i in part.images],
            torch.cat([part.latents for part in parts]),
            tuple(s for part in parts for s in part.seeds),
            tuple(p for part in parts for p in part.prompts),
            parts[0].settings,
            sum((part.evaluations for part in parts), Counter()),
            tuple(dict.fromkeys(n for part in parts for n in part.notices)),
            tuple(place for part in parts for place in part.places),
            parts[0].recorded,
            parts[0].walked,
            tuple(tile for part in parts for tile in part.tiles),
        )
