"""Laws of the grader: it reads real scenes, sharp or degraded, believes no wrong caption, and names no nonsense."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from train.world.grader import Found, Reading, grade, holds, read
from train.world.scenes import COLOURS, KINDS, OPPOSITE, RELATIONS, Placed, Scene, draw_scene, render
from train.world.sprites import objects, sprite

EACH = 50  # scenes per kind


@cache
def scenes(kind: str) -> tuple[tuple[Scene, Reading], ...]:
    """Fresh scenes of a kind with the readings of their renders."""
    rng = np.random.default_rng([20, KINDS.index(kind)])
    drawn = [draw_scene(rng, kind, "any") for _ in range(EACH)]
    return tuple((scene, read(render(scene))) for scene in drawn)


def degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a codec does to a picture: half of the time JPEG, half of the time blur and low-frequency noise."""
    if rng.random() < 0.5:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(40, 51)))
        return np.asarray(Image.open(buffer))
    sigma = rng.uniform(0.6, 1.0)
    noise = gaussian_filter(rng.standard_normal(image.shape), (3, 3, 0), mode="wrap")
    soft = gaussian_filter(image.astype(np.float64), (sigma, sigma, 0)) + noise / noise.std() * rng.uniform(2, 6)
    return np.clip(soft + 0.5, 0, 255).astype(np.uint8)


def wrong(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Scene]]:
    """Scenes that differ from this one in one fact of the caption, each with the name of that fact."""
    first, *rest = scene.placed
    other = str(rng.choice([n for n in objects("all") if n not in scene.names]))
    renamed = tuple(replace(p, name=other) if p.name == first.name else p for p in scene.placed)
    lies = [
        ("object", replace(scene, placed=renamed)),
        ("colour", replace(scene, colour=str(rng.choice([c for c in COLOURS if c != scene.colour])))),
    ]
    if scene.kind == "two":
        lies += [("relation", replace(scene, relation=r)) for r in RELATIONS if r != scene.relation]
        lies += [("relation", replace(scene, placed=(rest[0], first)))]
        lies += [("number", Scene("one", scene.colour, (first,)))]
    elif scene.kind == "count":
        more = (*scene.placed, first) if len(scene.placed) == 2 else scene.placed[1:]
        lies += [("number", replace(scene, placed=more)), ("number", Scene("one", scene.colour, (first,)))]
    else:
        lies += [("number", Scene("count", scene.colour, (first, first)))]
    return lies


def blend(rng: np.random.Generator) -> np.ndarray:
    """Two different objects of one size, one over the other, each half transparent."""
    names = rng.choice(objects("all"), 2, replace=False)
    colour, size = str(rng.choice(list(COLOURS))), int(rng.integers(32, 47))
    images = []
    for name in map(str, names):
        h, w = sprite(name, size).shape[:2]
        placed = Placed(name, size, 32 - w // 2, 32 - h // 2)
        images.append(render(Scene("one", colour, (placed,))).astype(np.float64))
    return np.clip(sum(images) / 2 + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_renders(kind: str) -> None:
    assert np.mean([holds(reading, scene) for scene, reading in scenes(kind)]) >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_places_and_sizes_are_those_of_the_scene(kind: str) -> None:
    for scene, reading in scenes(kind)[:20]:
        for p in scene.placed:
            x, y = p.centre
            near = min(reading.found, key=lambda f: abs(f.x - x) + abs(f.y - y))
            assert near.name == p.name
            assert max(abs(near.x - x), abs(near.y - y)) <= 1.5
            assert abs(near.size - p.size) <= 2.5
            assert 0 <= near.error < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_reads_degraded_renders(kind: str) -> None:
    rng = np.random.default_rng([30, KINDS.index(kind)])
    assert np.mean([grade(degraded(render(scene), rng), scene) for scene, _ in scenes(kind)]) >= 0.97


def test_believes_no_wrong_caption() -> None:
    rng = np.random.default_rng(40)
    lies = [(fact, holds(reading, lie)) for k in KINDS for scene, reading in scenes(k) for fact, lie in wrong(scene, rng)]
    for fact in ("object", "colour", "relation", "number"):
        believed = [held for name, held in lies if name == fact]
        assert len(believed) >= EACH
        assert np.mean(believed) <= 0.01


def test_names_nothing_in_noise_or_on_flat_grounds() -> None:
    rng = np.random.default_rng(50)
    fine = [rng.integers(0, 256, (64, 64, 3)) for _ in range(5)]
    coarse = [np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))) for _ in range(5)]
    for image in (*fine, *coarse):
        assert all(f.name is None for f in read(image.astype(np.uint8)).found)
    for colour, rgb in COLOURS.items():
        flat = np.broadcast_to(np.array(rgb, dtype=np.uint8), (64, 64, 3))
        assert read(flat) == Reading(colour, ())


def test_a_ground_of_no_palette_colour_has_no_name() -> None:
    reading = read(np.full((64, 64, 3), (190, 190, 60), dtype=np.uint8))
    assert reading.colour is None
    assert [f.name for f in reading.found] == [None]


def test_rejects_blends() -> None:
    rng = np.random.default_rng(60)
    named = [all(f.name is not None for f in read(blend(rng)).found) for _ in range(30)]
    assert np.mean(named) <= 0.04


def test_rejects_blobs() -> None:
    rng = np.random.default_rng(70)
    named = 0
    for _ in range(20):
        colour, rgb = str(rng.choice(list(COLOURS))), rng.integers(0, 256, 3)
        alpha = (gaussian_filter(rng.standard_normal((64, 64)), 5) > 0.05) & (np.hypot(*np.mgrid[-32:32, -32:32]) < 22)
        image = np.where(alpha[..., None], rgb, COLOURS[colour]).astype(np.uint8)
        reading = read(image)
        named += any(f.name is not None for f in reading.found) and all(f.name is not None for f in reading.found)
    assert named <= 1


def test_something_unknown_spoils_a_scene() -> None:
    scene, reading = scenes("one")[0]
    assert holds(reading, scene)
    assert not holds(replace(reading, found=(*reading.found, Found(None, 5, 5, 8, 1.0))), scene)
    assert not holds(replace(reading, found=()), scene)


def test_relation_is_that_of_the_greater_distance() -> None:
    a, b = objects()[:2]
    reading = Reading("red", (Found(a, 10, 20, 24, 0), Found(b, 40, 40, 24, 0)))
    for relation in RELATIONS:
        scene = Scene("two", "red", (Placed(a, 24, 0, 0), Placed(b, 24, 0, 0)), relation)
        turned = Scene("two", "red", scene.placed[::-1], OPPOSITE[relation])
        assert holds(reading, scene) == holds(reading, turned) == (relation == "left of")


@pytest.mark.parametrize("image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        read(image)


def test_objects_in_one_place_stand_in_no_relation() -> None:
    scene = draw_scene(np.random.default_rng(3), "two", "any")
    near = tuple(Found(name, 30 + k, 30, 25, 0.01) for k, name in enumerate(scene.names))
    assert not holds(Reading(scene.colour, near), scene)
