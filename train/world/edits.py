"""Edits of the world's scenes: what a picture of one object is to become, and which of its pixels have no reason to change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import binary_erosion

from train.world.grader import Found
from train.world.scenes import COLOURS, SIZE, Scene, colour_heldout
from train.world.sprites import objects, sprite

KINDS = ("object", "background")
MARGIN = 3  # pixels around the object's box that another object may also take


def changed(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    """A scene of one object with another object or another background, never a held-out combination of the two."""
    name, colour = scene.names[0], scene.colour
    if kind == "background":
        colours = [c for c in COLOURS if c != colour and not colour_heldout(name, c)]
        return replace(scene, colour=str(rng.choice(colours)))
    names = [n for n in objects() if n != name and not colour_heldout(n, colour)]
    return replace(scene, placed=(replace(scene.placed[0], name=str(rng.choice(names))),))


def kept(found: Found, kind: str) -> np.ndarray:
    """bool [64,64]: all but the box of what was found, where the object changes; the object without its edge, where its
    background does."""
    alpha = sprite(str(found.name), round(found.size))[..., 3]
    part = np.ones(np.add(alpha.shape, 2 * MARGIN)) if kind == "object" else alpha > 0.99
    h, w = part.shape
    top, left = SIZE + round(found.y - h / 2), SIZE + round(found.x - w / 2)
    canvas = np.zeros((3 * SIZE, 3 * SIZE), dtype=bool)
    canvas[top : top + h, left : left + w] = part
    whole = canvas[SIZE : 2 * SIZE, SIZE : 2 * SIZE]
    return ~whole if kind == "object" else np.asarray(binary_erosion(whole, iterations=2))
