"""The emoji world: scenes with exact captions, and a grader that reads them back without any network."""

from train.world.scenes import COLOURS, Scene, draw_scene, render, scene_at
from train.world.sprites import objects, plural

__all__ = ["COLOURS", "Scene", "draw_scene", "objects", "plural", "render", "scene_at"]
