"""Scenes of the emoji world: what stands where on which colour, its pixels, and captions that say exactly that.

A scene is a pure function of (seed, index), so a data set needs no files and any sample is addressed by its number.
Held out of training, in every kind of scene and in both directions: one background colour per object, and a tenth of
all unordered pairs of objects. Six whole objects (`objects("heldout")`) appear in no training scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.world.sprites import objects, plural, sprite

SIZE = 64
# Places come in steps of a folded cell of the U-Net (8 pixels), from 2 pixels off the edge, and an object has four sizes: what
# it looks like is then four patterns to learn, and a network of 20M parameters trained on two cores can learn them sharp.
CELL, EDGE = 8, 2
LARGE, SMALL = (32, 40), (20, 24)  # the longer side in pixels of an object alone, and of several
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 40),
    "yellow": (250, 222, 90),
    "green": (60, 160, 75),
    "teal": (40, 165, 165),
    "blue": (50, 95, 205),
    "purple": (125, 65, 175),
    "pink": (245, 160, 195),
    "brown": (120, 78, 48),
    "gray": (140, 140, 146),
    "white": (250, 250, 250),
    "black": (22, 22, 26),
}
KINDS = ("one", "two", "count")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Placed:
    """One object in a scene: its name, its longer side in pixels, and the top left corner of its box."""

    name: str
    size: int
    x: int
    y: int

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the box in pixels."""
        h, w = sprite(self.name, self.size).shape[:2]
        return h, w

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box."""
        h, w = self.shape
        return self.x + w / 2, self.y + h / 2


@dataclass(frozen=True)
class Scene:
    """A scene and the facts that its captions state. `relation` says where the first object stands to the second."""

    kind: str
    colour: str
    placed: tuple[Placed, ...]
    relation: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The distinct objects of the scene, in order."""
        return tuple(dict.fromkeys(p.name for p in self.placed))


def colour_heldout(name: str, colour: str) -> bool:
    """True where training never shows this object on this colour (one colour per object)."""
    return list(COLOURS).index(colour) == (5 * objects().index(name) + 3) % len(COLOURS)


def pair_heldout(a: str, b: str) -> bool:
    """True where training never shows these two objects together, whichever comes first (a tenth of all pairs)."""
    i, j = sorted((objects().index(a), objects().index(b)))
    return (7 * i + 13 * j) % 10 == 0


def _place(rng: np.random.Generator, extent: int) -> int:
    """A place on the grid for a side of `extent` pixels, drawn evenly."""
    return int(rng.choice(np.arange(EDGE, SIZE - EDGE - extent + 1, CELL)))


def _one(rng: np.random.Generator, names: tuple[str, ...]) -> tuple[Placed, ...]:
    size = int(rng.choice(LARGE))
    h, w = sprite(names[0], size).shape[:2]
    return (Placed(names[0], size, _place(rng, w), _place(rng, h)),)


def _two(rng: np.random.Generator, names: tuple[str, ...], relation: str) -> tuple[Placed, ...]:
    """Two objects side by side (or stacked), apart by at least two pixels along the axis of the relation."""
    sizes = [int(s) for s in rng.choice(SMALL, 2)]
    shapes = [sprite(n, s).shape[:2] for n, s in zip(names, sizes, strict=True)]
    axis = 1 if relation in ("left of", "right of") else 0
    first, second = (0, 1) if relation in ("left of", "above") else (1, 0)
    while True:
        at = [_place(rng, shape[axis]) for shape in shapes]
        if at[first] + shapes[first][axis] + 2 <= at[second]:
            break
    # Across the axis both sit near one line, so that no other relation could be read into the scene.
    line = int(rng.integers(20, SIZE - 19))
    across = [_nearest(line + int(rng.integers(-4, 5)) - s[1 - axis] // 2, s[1 - axis]) for s in shapes]
    return tuple(
        Placed(names[i], sizes[i], at[i], across[i]) if axis else Placed(names[i], sizes[i], across[i], at[i]) for i in (0, 1)
    )


def _nearest(at: int, extent: int) -> int:
    """The place on the grid nearest to `at` for a side of `extent` pixels."""
    return int(np.clip(EDGE + CELL * round((at - EDGE) / CELL), EDGE, EDGE + (SIZE - 2 * EDGE - extent) // CELL * CELL))


def _count(rng: np.random.Generator, names: tuple[str, ...], number: int) -> tuple[Placed, ...]:
    """Two or three of a kind, boxes at least two pixels apart, anywhere (tried until they fit)."""
    while True:
        placed: list[Placed] = []
        for _ in range(60):
            size = int(rng.choice(SMALL))
            h, w = sprite(names[0], size).shape[:2]
            new = Placed(names[0], size, _place(rng, w), _place(rng, h))
            if all(_apart(new, old) for old in placed):
                placed.append(new)
            if len(placed) == number:
                return tuple(sorted(placed, key=lambda p: (p.x, p.y)))


def _apart(a: Placed, b: Placed, gap: int = 2) -> bool:
    (ah, aw), (bh, bw) = a.shape, b.shape
    return a.x + aw + gap <= b.x or b.x + bw + gap <= a.x or a.y + ah + gap <= b.y or b.y + bh + gap <= a.y


def draw_scene(rng: np.random.Generator, kind: str, split: str = "train") -> Scene:
    """Draw one scene of a kind ("one", "two", "count").

    split "train" leaves out every held-out combination; "colour" draws only held-out object-colour pairs; "pair" only
    held-out object pairs (kind "two") on allowed colours; "any" draws everything.
    """
    names, colours = objects(), list(COLOURS)
    while True:
        chosen = tuple(names[i] for i in rng.choice(len(names), 2 if kind == "two" else 1, replace=False))
        colour = colours[rng.integers(len(colours))]
        by_colour = any(colour_heldout(n, colour) for n in chosen)
        by_pair = len(chosen) == 2 and pair_heldout(*chosen)
        if split == "any" or (by_colour, by_pair) == (split == "colour", split == "pair"):
            break
    if kind == "one":
        return Scene(kind, colour, _one(rng, chosen))
    if kind == "two":
        relation = RELATIONS[rng.integers(4)]
        return Scene(kind, colour, _two(rng, chosen, relation), relation)
    if kind == "count":
        return Scene(kind, colour, _count(rng, chosen, int(rng.integers(2, 4))))
    raise ValueError(f"{kind!r} is not a kind of scene; choose from {', '.join(KINDS)}")


def scene_at(seed: int, index: int, shares: tuple[float, float, float] = (0.5, 0.25, 0.25)) -> tuple[Scene, str]:
    """Training scene number `index` of the stream `seed`, with one of its captions. `shares`: of the three kinds."""
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    scene = draw_scene(rng, KINDS[rng.choice(3, p=shares)])
    return scene, caption(scene, rng)


def render(scene: Scene) -> np.ndarray:
    """The pixels of a scene: uint8 [64,64,3]."""
    image = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    image[:] = COLOURS[scene.colour]
    for p in scene.placed:
        s = sprite(p.name, p.size)
        h, w = s.shape[:2]
        box = image[p.y : p.y + h, p.x : p.x + w]
        box *= 1 - s[..., 3:]
        box += s[..., :3]
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def article(name: str) -> str:
    """ "a fox", "an owl"; "a unicorn" as it is spoken."""
    return f"an {name}" if name[0] in "aeiou" and not name.startswith("uni") else f"a {name}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Every phrasing of a scene, all of them exact. The first is the plainest, used for grading."""
    if scene.kind == "two":
        a, b = scene.names
        r, o = scene.relation, OPPOSITE[scene.relation]
        to = {"left of": "to the left of", "right of": "to the right of"}
        facts: tuple[str, ...] = (
            f"{article(a)} {r} {article(b)}",
            f"{article(b)} {o} {article(a)}",
            f"{article(a)} {to.get(r, r)} {article(b)}",
            f"{article(b)} {to.get(o, o)} {article(a)}",
        )
    elif scene.kind == "count":
        facts = (f"{NUMBERS[len(scene.placed)]} {plural(scene.names[0])}",)
    else:
        facts = (article(scene.names[0]),)
    ground = article(scene.colour)
    return tuple(
        phrase
        for fact in facts
        for phrase in (
            f"{fact} on {ground} background",
            f"{fact} on {scene.colour}",
            f"a picture of {fact} on {ground} background",
            f"{ground} background with {fact}",
        )
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrasing, the plain "... on a ... background" half of the time."""
    phrases = captions(scene)
    plain = phrases[::4]
    return plain[rng.integers(len(plain))] if rng.random() < 0.5 else phrases[rng.integers(len(phrases))]
