"""The lenient reading names what is there, and nothing that is not."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from train.world import draw_scene, render
from train.world.grader import grade
from train.world.nearest import nearest, resembles


def test_renders_resemble_their_scenes_and_no_others() -> None:
    rng = np.random.default_rng(5)
    scenes = [draw_scene(rng, kind) for kind in ("one", "two", "count") * 8]
    pictures = [render(s) for s in scenes]
    assert all(resembles(p, s) for p, s in zip(pictures, scenes, strict=True))
    assert not any(resembles(p, s) for p, s in zip(pictures, [*scenes[3:], *scenes[:3]], strict=True))


def test_it_still_names_what_is_badly_drawn() -> None:
    """Blurred beyond what the grader takes, most objects are still the nearest."""
    rng = np.random.default_rng(6)
    scenes = [draw_scene(rng, "one") for _ in range(16)]
    soft = [gaussian_filter(render(s), (5, 5, 0)) for s in scenes]
    near, strict = (np.mean([judge(p, s) for p, s in zip(soft, scenes, strict=True)]) for judge in (resembles, grade))
    assert strict < near
    assert near >= 0.5


def test_no_ground_is_no_reading() -> None:
    noise = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert nearest(noise, 2).found == ()
