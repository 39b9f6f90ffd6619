"""A lenient second opinion: the sprites a picture is nearest to, as many as were asked for, without a reject class.

It tells apart "the wrong thing" from "the right thing, badly drawn", which the grader both turns down.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from train.world.grader import BLUR_IMAGE, Reading, _coarse, _ground, _halved, _refine, holds
from train.world.scenes import Scene


def nearest(image: np.ndarray, count: int) -> Reading:
    """The `count` sprites that explain most of a picture (uint8 [64,64,3]), the strongest first, named whatever their error."""
    colour, ground = _ground(image)
    if colour is None:
        return Reading(None, ())
    field = np.asarray(gaussian_filter(image - ground, (BLUR_IMAGE, BLUR_IMAGE, 0), mode="nearest"))
    found = []
    for _ in range(count):
        half = _halved(field)
        fit, _ = _refine(field, ground, np.stack([bank.scores(half, ground) for bank in _coarse()]))
        found.append(fit.found)
        field = field - fit.drawn
    return Reading(colour, tuple(found))


def resembles(image: np.ndarray, scene: Scene) -> bool:
    """True where the nearest sprites are what the captions of `scene` say."""
    return holds(nearest(image, len(scene.placed)), scene)
