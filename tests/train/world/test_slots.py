"""Slots: every side has a token of its own behind the words, and a box says where its object stands."""

from __future__ import annotations

import torch

from train.world import Scene, scene_at
from train.world.scenes import Placed, captions
from train.world.slots import SLOT, WINDOW, placed, roles
from train.world.words import make_tokenizer

FOX, OWL = Placed("fox", 24, 2, 10), Placed("owl", 20, 34, 2)


def test_roles_say_what_stands_where() -> None:
    assert roles(Scene("two", "red", (FOX, OWL), "left of")) == {"left of": "fox", "right of": "owl"}
    assert roles(Scene("two", "red", (OWL, FOX), "right of")) == {"right of": "owl", "left of": "fox"}
    assert roles(Scene("two", "red", (FOX, OWL), "below")) == {"below": "fox", "above": "owl"}
    assert roles(Scene("one", "red", (FOX,))) == roles(Scene("count", "red", (FOX, FOX))) == {}


def test_a_box_stands_beside_the_slot_of_its_side() -> None:
    for scene in (Scene("two", "red", (FOX, OWL), "left of"), Scene("two", "red", (OWL, FOX), "right of")):
        named, boxes = placed(scene)
        by_slot = {int(row.argmax()): box for row, box in zip(named, boxes, strict=True)}
        h, w = FOX.shape
        assert torch.equal(by_slot[SLOT["left of"]], torch.tensor([2, 10, 2 + w, 10 + h]) / 64)
        assert by_slot[SLOT["right of"]][0] == 34 / 64
        assert named.sum() == 2
    for nothing in (None, Scene("one", "red", (FOX,))):
        assert not any(t.any() for t in placed(nothing))


def test_no_caption_reaches_the_slots() -> None:
    tokenizer = make_tokenizer(WINDOW)
    longest = max(len(tokenizer(c).input_ids) for i in range(500) for c in captions(scene_at(1, i)[0]))
    assert longest <= min(SLOT.values())
