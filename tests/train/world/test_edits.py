"""What an edit leaves alone, against the renders of the scene before and after."""

from __future__ import annotations

import numpy as np
import pytest

from train.world import draw_scene, render
from train.world.edits import KINDS, changed, kept
from train.world.grader import read
from train.world.scenes import colour_heldout


@pytest.mark.parametrize("kind", KINDS)
def test_kept_pixels_are_those_that_a_perfect_edit_leaves(kind: str) -> None:
    """A new object at the old one's place, of its size, changes nothing outside the box; a new background nothing inside."""
    rng, tried = np.random.default_rng(3), 0
    while tried < 12:
        before = draw_scene(rng, "one", "train")
        after = changed(before, kind, rng)
        mask = kept(read(render(before)).found[0], kind)
        assert 30 < mask.sum() < 64 * 64 - 300
        if all(a <= b for a, b in zip(after.placed[0].shape, before.placed[0].shape, strict=True)):
            moved = np.abs(render(before).astype(int) - render(after)).max(-1)
            assert moved[mask].max() <= 2  # a sprite's resampled alpha is nearly, not quite, one
            assert moved[~mask].max() > 40
            tried += 1


@pytest.mark.parametrize("kind", KINDS)
def test_edits_change_one_thing_into_what_training_shows(kind: str) -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        before = draw_scene(rng, "one", "train")
        after = changed(before, kind, rng)
        assert (before.names != after.names, before.colour != after.colour) == (kind == "object", kind == "background")
        assert not colour_heldout(after.names[0], after.colour)
