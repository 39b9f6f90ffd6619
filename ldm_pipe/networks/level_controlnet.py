"""A ControlNet for a U-Net whose resolutions have different numbers of layers, as the built-in model's: diffusers' class takes
one number for all.

Adding Conditional Control to Text-to-Image Diffusion Models, Zhang et al. 2023, arXiv 2302.05543, section 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn


def __getattr__(name: str) -> Any:
    """`LevelControlNet`, made when it is asked for: diffusers is heavy to import."""
    if name != "LevelControlNet":
        raise AttributeError(name)
    return _made()


@cache
def _made() -> Any:
    from diffusers import ControlNetModel

    names = [n for n in inspect.signature(ControlNetModel.__init__).parameters if n != "self"]

    class LevelControlNet(ControlNetModel, nn.Module):  # type: ignore[misc]
        """diffusers' ControlNetModel with a layers_per_block for every resolution; the other arguments are its own."""

        def __init__(self, layers_per_block: Sequence[int] = (2, 2, 2, 2), **given: Any) -> None:
            super().__init__(layers_per_block=1, **given)
            alike: dict[int, Any] = {n: ControlNetModel(layers_per_block=n, **given) for n in set(layers_per_block)}
            blocks = nn.ModuleList(alike[n].down_blocks[i] for i, n in enumerate(layers_per_block))
            last, zeros = len(blocks) - 1, [alike[layers_per_block[0]].controlnet_down_blocks[0]]
            for i, n in enumerate(layers_per_block):
                first = 1 + i * (n + 1)  # behind that of the first convolution; every level but the last also halves
                zeros += alike[n].controlnet_down_blocks[first : first + n + (i < last)]
            self.down_blocks, self.controlnet_down_blocks = blocks, nn.ModuleList(zeros)
            self.register_to_config(layers_per_block=list(layers_per_block))  # type: ignore[operator]

        @classmethod
        def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **_: Any) -> Any:
            """Of a config.json that `save_pretrained` wrote."""
            made = cls(**{n: config[n] for n in names if n in config})
            return (made, {}) if return_unused_kwargs else made

        @classmethod
        def from_unet(cls, unet: Any, conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256), **_: Any) -> Any:
            """A copy of a U-Net's way down and middle behind zero convolutions."""
            given: Mapping[str, Any] = {n: unet.config[n] for n in names if n in unet.config}
            made: Any = cls(**given, conditioning_embedding_out_channels=tuple(conditioning_embedding_out_channels))
            own, theirs = made.state_dict(), unet.state_dict()
            made.load_state_dict({n: theirs.get(n, t) for n, t in own.items()})
            return made

    return LevelControlNet
