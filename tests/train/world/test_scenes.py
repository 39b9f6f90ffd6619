"""Scenes: captions are exact, held-out combinations never occur in training, a scene is a function of its number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.world import COLOURS, draw_scene, objects, render, scene_at
from train.world.scenes import CELL, EDGE, KINDS, LARGE, OPPOSITE, SMALL, captions, colour_heldout, pair_heldout
from train.world.sprites import HERE, sprite
from train.world.words import make_tokenizer, vocabulary

STREAM = [scene_at(23, i) for i in range(3000)]


def test_the_world_is_large_enough() -> None:
    assert len(objects()) >= 100
    assert len(objects("heldout")) == 6
    assert len(COLOURS) >= 10
    assert (HERE / "atlas.png").stat().st_size <= 2e6
    assert (HERE / "ATLAS_LICENSE").exists()


def test_training_never_shows_what_is_held_out() -> None:
    for scene, _ in STREAM:
        assert set(scene.names) <= set(objects())
        assert not any(colour_heldout(n, scene.colour) for n in scene.names)
        assert len(scene.names) == 1 or not pair_heldout(*scene.names)
    assert all(sum(colour_heldout(n, c) for c in COLOURS) == 1 for n in objects())
    pairs = [(a, b) for a in objects() for b in objects() if a < b]
    assert all(pair_heldout(a, b) == pair_heldout(b, a) for a, b in pairs)
    assert 0.08 < np.mean([pair_heldout(a, b) for a, b in pairs]) < 0.12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["colour", "pair"])
def test_held_out_scenes_hold_what_is_held_out(kind: str, split: str) -> None:
    if split == "pair" and kind != "two":
        return
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), kind, split)
        assert any(colour_heldout(n, scene.colour) for n in scene.names) == (split == "colour")
        assert (len(scene.names) == 2 and pair_heldout(*scene.names)) == (split == "pair")


def test_relations_are_what_the_captions_say() -> None:
    for scene, _ in STREAM:
        if scene.kind != "two":
            continue
        (ax, ay), (bx, by) = (p.centre for p in scene.placed)
        dx, dy = bx - ax, by - ay
        assert {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation] > 15
        assert abs(dx) > 1.5 * abs(dy) or abs(dy) > 1.5 * abs(dx)


def test_objects_stay_inside_and_apart() -> None:
    for scene, _ in STREAM:
        for p in scene.placed:
            h, w = p.shape
            assert p.x >= 1
            assert p.y >= 1
            assert p.x + w <= 63
            assert p.y + h <= 63
    corner = render(scene_at(0, 5)[0])[0, 0]
    assert tuple(corner) == COLOURS[scene_at(0, 5)[0].colour]


def test_places_and_sizes_come_in_steps_and_vary() -> None:
    placed = [p for scene, _ in STREAM for p in scene.placed]
    assert all(v % CELL == EDGE for p in placed for v in (p.x, p.y))
    assert {p.size for p in placed} == {*LARGE, *SMALL}
    assert all((p.size in LARGE) == (scene.kind == "one") for scene, _ in STREAM for p in scene.placed)
    for kind in KINDS:
        assert len({(p.x, p.y) for scene, _ in STREAM if scene.kind == kind for p in scene.placed}) >= 20


def test_captions_name_all_and_only_what_is_there() -> None:
    for scene, words in STREAM[:500]:
        assert words in captions(scene)
        for text in captions(scene):
            assert scene.colour in text.split()
            if scene.kind == "two":
                said = text.split()
                a, b = (said.index(n) for n in scene.names)
                relation = scene.relation if a < b else OPPOSITE[scene.relation]
                assert relation.split()[0] in said[min(a, b) : max(a, b)]
            if scene.kind == "count":
                assert ["two", "three"][len(scene.placed) - 2] in text.split()


def test_a_scene_is_a_function_of_its_number() -> None:
    assert scene_at(23, 7) == STREAM[7]
    assert scene_at(24, 7) != STREAM[7]
    assert len({s for s, _ in STREAM}) > 2900


def test_every_word_is_one_token_and_fits_the_window() -> None:
    tokenizer = make_tokenizer(24)
    assert all(len(tokenizer(w).input_ids) == 3 for w in vocabulary())
    assert all(len(tokenizer(w).input_ids) > 3 for w in objects("heldout"))
    assert max(len(tokenizer(w).input_ids) for s, _ in STREAM[:800] for w in captions(s)) <= 24


def test_sprites_are_cut_whole(tmp_path: Path) -> None:
    for name in objects("all"):
        s = sprite(name, 40)
        assert max(s.shape[:2]) == 40
        assert s[..., 3].max() > 0.9
        over = s[..., :3] - 255 * s[..., 3:]
        assert over.max() < 40  # premultiplied, up to the resampling's ringing
        assert over.clip(0).mean() < 0.5
