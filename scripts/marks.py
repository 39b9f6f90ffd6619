"""How many answers are right of a model that `finetune_builtin.py` taught.

A style: a black line around objects, counted where a third of the rim of what stands out of the ground is near black. A
subject: an object that no training scene shows. A layout: every object where a map of edges has it, to within five pixels.
Objects are named by the nearest sprite, whatever its error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import torch
from lessons import NAMES, alone, outlined, standing_out
from measuring import graded, scenes, share
from PIL import Image
from scipy import ndimage

from ldm_pipe import Pipeline
from ldm_pipe.doors.controls import Controls
from ldm_pipe.doors.image_prompt import ImagePrompt
from ldm_pipe.image import to_pil, to_tensor
from train.hints import edges
from train.world import render
from train.world.nearest import nearest
from train.world.scenes import COLOURS, Scene, captions

DARK = 70  # what counts as black, of 256 levels
NEAR = 5.0  # pixels between where an object is and where it was to be


@dataclass
class Result:
    """Of one model: the pictures of the sheet, in rows of eight, shares that are right, and other figures."""

    pictures: list[Any]
    right: dict[str, dict[str, float]]
    other: dict[str, float] = field(default_factory=dict)


def ring(picture: np.ndarray) -> np.ndarray:
    """The outermost two pixels of what stands out of the ground of a picture [64,64,3]."""
    inside = standing_out(picture)
    return np.asarray(inside & ~ndimage.binary_erosion(inside, iterations=2))


def has_line(picture: np.ndarray) -> bool:
    """Is at least a third of the objects' rim near black?"""
    around = picture[ring(picture)]
    return len(around) > 0 and float((around.max(-1) < DARK).mean()) > 1 / 3


def names_right(picture: np.ndarray, scene: Scene) -> bool:
    """Are the nearest sprites exactly the commanded objects?"""
    return _names(nearest(picture, len(scene.placed)).found, scene)


def _names(found: Sequence[Any], scene: Scene) -> bool:
    return Counter(f.name for f in found) == Counter(p.name for p in scene.placed)


def _places(found: Sequence[Any], scene: Scene) -> bool:
    """Is there something for every object of the scene, of its name and within `NEAR` pixels of its middle?"""

    def meet(order: Sequence[Any]) -> bool:
        pairs = zip(order, scene.placed, strict=True)
        return all(f.name == p.name and np.hypot(f.x - p.centre[0], f.y - p.centre[1]) <= NEAR for f, p in pairs)

    return any(map(meet, permutations(found)))


def drawn(pipe: Pipeline, prompts: list[str]) -> list[np.ndarray]:
    """Picture i of prompt i and seed i."""
    out = pipe(prompts, seeds=tuple(range(len(prompts))), batch_size=25)
    return [np.asarray(i) for i in out.images]


def old_objects(pipe: Pipeline, count: int) -> dict[str, float]:
    """What is left of the objects that the model knew, on their own."""
    wanted = scenes("one", "train", count, 92)
    return share(sum(map(names_right, drawn(pipe, [captions(s)[0] for s in wanted]), wanted)), count)


def of_style(pipe: Pipeline, count: int) -> Result:
    """The line and the objects of scenes of one object."""
    wanted = _scenes_of_style(count)
    return _style(drawn(pipe, [captions(s)[0] for s in wanted]), wanted)


def style_itself(pipe: Pipeline, count: int) -> Result:
    """What there is to reach: the same scenes outlined, through the codec."""
    wanted = _scenes_of_style(count)
    return _style([np.asarray(through_codec(pipe, outlined(s))) for s in wanted], wanted)


def _scenes_of_style(count: int) -> list[Scene]:
    return [s for s in scenes("one", "train", 2 * count, 91) if s.colour != "black"][:count]


def _style(pictures: list[np.ndarray], wanted: list[Scene]) -> Result:
    line = share(sum(map(has_line, pictures)), len(wanted))
    right = share(sum(map(names_right, pictures, wanted)), len(wanted))
    rims = [float(p[ring(p)].max(-1).mean()) for p in pictures if ring(p).any()]
    return Result(pictures[:8], {"line": line, "objects": right}, {"brightness of the rim, of 255": float(np.mean(rims))})


def through_codec(pipe: Pipeline, picture: np.ndarray) -> Image.Image:
    """A picture [64,64,3], encoded and decoded."""
    codec = pipe.bundle.codec
    with torch.no_grad():
        return to_pil(codec.decode(codec.encode(to_tensor([Image.fromarray(picture)]))))[0]


def of_subject(name: str, word: str) -> Callable[[Pipeline, int], Result]:
    """A subject on colours, most of them unseen, and beside old objects; and old objects, which are to stay."""

    def measure(pipe: Pipeline, count: int) -> Result:
        colours = list(COLOURS)
        single = [alone(name, colours[k % len(colours)]) for k in range(count)]
        pictures = drawn(pipe, [f"a {word} on a {s.colour} background" for s in single])
        new = share(sum(map(names_right, pictures, single)), count)
        with_old = scenes("two", "train", count, 93)
        told = [f"a {word} {s.relation} a {s.names[1]} on a {s.colour} background" for s in with_old]
        beside = drawn(pipe, told)
        both = share(sum(_both(p, (name, s.names[1])) for p, s in zip(beside, with_old, strict=True)), count)
        found = {"the subject on a colour": new, "the subject beside an old object": both}
        return Result([*pictures[:4], *beside[:4]], found | {"old objects": old_objects(pipe, count)})

    return measure


def _both(picture: np.ndarray, names: Sequence[str]) -> bool:
    return {f.name for f in nearest(picture, 2).found} == set(names)


def of_pair(words: Sequence[str]) -> Callable[[Pipeline, int], Result]:
    """Both subjects in one picture, each alone, and old objects. words: what they are called."""

    def measure(pipe: Pipeline, count: int) -> Result:
        colours, scene = list(COLOURS), scenes("two", "train", count, 94)
        pictures = drawn(pipe, [f"a {words[0]} {s.relation} a {words[1]} on a {s.colour} background" for s in scene])
        found, shown = {"both in one picture": share(sum(_both(p, NAMES) for p in pictures), count)}, pictures[:4]
        for name, word in zip(NAMES, words, strict=True):
            lone = [alone(name, colours[k % len(colours)]) for k in range(count)]
            single = drawn(pipe, [f"a {word} on a {s.colour} background" for s in lone])
            found[f"{word} alone"] = share(sum(map(names_right, single, lone)), count)
            shown += single[:2]
        return Result(shown, found | {"old objects": old_objects(pipe, count)})

    return measure


def of_layout(control: str) -> Callable[[Pipeline, int], Result]:
    """Objects where a map of edges has them. control: the folder that reads the map, "" for none."""

    def measure(pipe: Pipeline, count: int) -> Result:
        wanted = [s for kind in ("one", "two", "count") for s in scenes(kind, "train", -(-count // 3), 95)][:count]
        pictures, maps = ([] if control else drawn(pipe, [captions(s)[0] for s in wanted])), []
        for k, scene in enumerate(wanted if control else []):
            lines = edges(to_tensor([Image.fromarray(render(scene))])[0])
            maps.append(np.asarray(to_pil(lines[None] * 2 - 1)[0]))
            plan = pipe.plan([captions(scene)[0]], seed=k)
            steered = Controls((control,), (1.0,)).applied(pipe, plan, [Image.fromarray(maps[-1])])
            pictures.append(np.asarray(next(pipe.run(steered)).images[0]))
        found = [nearest(p, len(s.placed)).found for p, s in zip(pictures, wanted, strict=True)]
        layout, names = (share(sum(map(mark, found, wanted)), count) for mark in (_places, _names))
        turns = [k * count // 8 for k in range(8)]  # all kinds of scenes on the sheet
        shown = [pictures[k] for k in turns] + [maps[k] for k in turns if control]
        return Result(shown, {"layout": layout, "objects": names})

    return measure


def of_variation(shown: bool) -> Callable[[Pipeline, int], Result]:
    """Pictures of scenes of one object, drawn again without a word. shown: is the model told of them?"""

    def measure(pipe: Pipeline, count: int) -> Result:
        wanted = scenes("one", "train", count, 97)
        given, pictures = [render(s) for s in wanted], list[np.ndarray]()
        for k, picture in enumerate(given):
            plan = pipe.plan([""], seed=k)
            whole = ImagePrompt(0).applied(pipe, plan, Image.fromarray(picture)) if shown else plan
            pictures.append(np.asarray(next(pipe.run(whole)).images[0]))
        named, graded_right = sum(map(names_right, pictures, wanted)), graded(pictures, wanted)
        found = {"its object": share(named, count), "object and colour, by the grader": share(graded_right, count)}
        return Result([*(given[:8] if shown else []), *pictures[:8]], found)

    return measure
