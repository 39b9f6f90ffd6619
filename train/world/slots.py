"""Slots: the last tokens of a prompt's window, where the text encoder says what stands on which side.

A causal encoder cannot write a role on the object named first: "a fox" is read before "left of". The padding behind the words
has seen them all, so each of its last four tokens is one side's: what the captions put there is named there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.world.scenes import OPPOSITE, SIZE, Scene

WINDOW = 24  # tokens of a prompt
SLOT = {"left of": WINDOW - 1, "right of": WINDOW - 2, "above": WINDOW - 3, "below": WINDOW - 4}


def roles(scene: Scene) -> dict[str, str]:
    """What stands on which side, by relation: {"left of": "fox", "right of": "owl"}; empty where nothing is related."""
    if scene.kind != "two":
        return {}
    first, second = scene.names
    return {scene.relation: first, OPPOSITE[scene.relation]: second}


def placed(scene: Scene | None) -> tuple[Tensor, Tensor]:
    """named [2,WINDOW] and boxes [2,4] of the two related objects, as `grounding` takes them; zeros where there are none."""
    named, boxes = torch.zeros(2, WINDOW), torch.zeros(2, 4)
    if scene is not None and scene.kind == "two":
        for i, (relation, thing) in enumerate(zip(roles(scene), scene.placed, strict=True)):
            h, w = thing.shape
            named[i, SLOT[relation]] = 1
            boxes[i] = torch.tensor([thing.x, thing.y, thing.x + w, thing.y + h]) / SIZE
    return named, boxes
