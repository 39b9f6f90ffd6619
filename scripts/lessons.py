"""What the built-in model is taught by `finetune_builtin.py`: the pictures of each lesson, and how many answers are right.

A style: a black line around objects, counted where a third of the rim of what stands out of the ground is near black. A
subject: an object that no training scene shows. Objects are named by the nearest sprite, whatever its error.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import scenes, share
from PIL import Image
from scipy import ndimage

from ldm_pipe import Pipeline
from train.world import render
from train.world.nearest import nearest
from train.world.scenes import COLOURS, Placed, Scene, captions, scene_at
from train.world.sprites import objects, sprite

WORD = "<new>"
STANDS_OUT, DARK = 40, 70  # of a colour to the ground's, and of what counts as black, in 256 levels


@dataclass(frozen=True)
class Result:
    """What is shown of a model: pictures of the prompts, and how many are right in which sense."""

    pictures: list[Any]
    figures: dict[str, dict[str, float]]


def ring(picture: np.ndarray) -> np.ndarray:
    """The outermost two pixels of what stands out of the ground of a picture [64,64,3]."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    inside = np.abs(picture.astype(int) - np.median(border, axis=0)).max(-1) > STANDS_OUT
    return np.asarray(inside & ~ndimage.binary_erosion(inside, iterations=2))


def outlined(scene: Scene) -> np.ndarray:
    """A scene with a black line around its objects, two pixels wide: the codec does not keep one."""
    picture = render(scene)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    inside = np.abs(picture.astype(int) - np.median(border, axis=0)).max(-1) > STANDS_OUT
    picture[ndimage.binary_dilation(inside, iterations=2) & ~inside] = 0
    return picture


def has_line(picture: np.ndarray) -> bool:
    """Is at least a third of the objects' rim near black?"""
    around = picture[ring(picture)]
    return len(around) > 0 and float((around.max(-1) < DARK).mean()) > 1 / 3


def names_right(picture: np.ndarray, scene: Scene) -> bool:
    """Are the nearest sprites exactly the commanded objects?"""
    return Counter(f.name for f in nearest(picture, len(scene.placed)).found) == Counter(p.name for p in scene.placed)


def styled(folder: Path) -> None:
    """40 outlined scenes on colours where a black line can be seen, with their captions."""
    made = index = 0
    while made < 40:
        scene, words = scene_at(4040, index)
        index += 1
        if scene.colour != "black":
            Image.fromarray(outlined(scene)).save(folder / f"{made:02}.png")
            (folder / f"{made:02}.txt").write_text(words)
            made += 1


def subject(folder: Path) -> None:
    """Four renders of one held-out object, each on another colour."""
    name = objects("heldout")[0]
    for k, colour in enumerate(("red", "blue", "white", "green")):
        h, w = sprite(name, 40).shape[:2]
        scene = Scene("one", colour, (Placed(name, 40, (64 - w) // 2, (64 - h) // 2),))
        Image.fromarray(render(scene)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a {WORD} on a {colour} background")


def drawn(pipe: Pipeline, prompts: list[str]) -> list[np.ndarray]:
    """Picture i of prompt i and seed i."""
    out = pipe(prompts, seeds=tuple(range(len(prompts))), batch_size=25)
    return [np.asarray(i) for i in out.images]


def of_style(pipe: Pipeline, count: int) -> Result:
    """The line and the objects of scenes of all kinds."""
    wanted = [s for s in scenes("one", "train", 2 * count, 91) if s.colour != "black"][:count]
    pictures = drawn(pipe, [captions(s)[0] for s in wanted])
    line = share(sum(map(has_line, pictures)), count)
    right = share(sum(names_right(p, s) for p, s in zip(pictures, wanted, strict=True)), count)
    return Result(pictures, {"line": line, "objects": right})


def of_subject(pipe: Pipeline, count: int) -> Result:
    """The subject on colours, half of them unseen, and old objects, which are to stay."""
    name, colours = objects("heldout")[0], list(COLOURS)
    wanted = [Scene("one", colours[k % len(colours)], (Placed(name, 40, 12, 12),)) for k in range(count)]
    pictures = drawn(pipe, [f"a {WORD} on a {s.colour} background" for s in wanted])
    old = scenes("one", "train", count, 92)
    before = drawn(pipe, [captions(s)[0] for s in old])
    new = share(sum(names_right(p, s) for p, s in zip(pictures, wanted, strict=True)), count)
    kept = share(sum(names_right(p, s) for p, s in zip(before, old, strict=True)), count)
    return Result(pictures, {"subject": new, "old objects": kept})
