"""What the built-in model is taught by `finetune_builtin.py`: the pictures of each lesson."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from ldm_pipe.image import to_pil, to_tensor
from train.world import render
from train.world.scenes import Placed, Scene, scene_at
from train.world.sprites import objects, sprite

WORDS = ("<new>", "<toy>")  # of the first and the second subject
NAMES = objects("heldout")[:2]  # what they are
SEEN = ("red", "blue", "white", "green")  # the colours that their renders are on
KNOWN = "owl"  # an object of the training scenes, to be found again under a new word
RARE = ("zkr", "vqx")  # what DreamBooth calls them: no words of the captions, so the tokenizer spells them
STANDS_OUT = 40  # of a colour to the ground's, in 256 levels


def standing_out(picture: np.ndarray) -> np.ndarray:
    """Where a picture [64,64,3] is not its ground."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return np.asarray(np.abs(picture.astype(int) - np.median(border, axis=0)).max(-1) > STANDS_OUT)


def outlined(scene: Scene) -> np.ndarray:
    """A scene with a black line around its objects, three pixels wide."""
    picture = render(scene)
    inside = standing_out(picture)
    picture[ndimage.binary_dilation(inside, iterations=3) & ~inside] = 0
    return picture


def styled(folder: Path) -> None:
    """40 outlined scenes on colours where a black line can be seen, with their captions."""
    made = index = 0
    while made < 40:
        scene, words = scene_at(4040, index)
        index += 1
        if scene.colour != "black":
            _save(folder / f"{made:02}", outlined(scene), words)
            made += 1


def subject(name: str, word: str) -> Callable[[Path], None]:
    """Four renders of an object, each on another colour."""

    def four(folder: Path) -> None:
        for k, colour in enumerate(SEEN):
            _save(folder / str(k), render(alone(name, colour)), f"a {word} on a {colour} background")

    return four


def in_places(name: str, word: str, second: int = 24) -> Callable[[Path], None]:
    """Four renders of an object: large, of `second` pixels near the edge, and twice small beside an object that the model
    knows."""
    scenes = (
        alone(name, SEEN[0]),
        Scene("one", SEEN[1], (Placed(name, second, 2, 58 - second),)),
        Scene("two", SEEN[2], (Placed(name, 24, 2, 18), Placed("duck", 24, 34, 18)), "left of"),
        Scene("two", SEEN[3], (Placed(name, 20, 26, 34), Placed("cat", 24, 18, 2)), "below"),
    )

    def four(folder: Path) -> None:
        for k, (scene, said) in enumerate(zip(scenes, told_in_places(word), strict=True)):
            _save(folder / str(k), render(scene), said)

    return four


def two_in_places(words: Sequence[str]) -> Callable[[Path], None]:
    """The four of each subject."""

    def eight(folder: Path) -> None:
        for name, word in zip(NAMES, words, strict=True):
            (folder / name).mkdir()
            in_places(name, word)(folder / name)

    return eight


def told_in_places(word: str) -> list[str]:
    """The captions of `in_places`."""
    beside = ("", "", "left of a duck ", "below a cat ")
    return [f"a {word} {b}on a {colour} background" for b, colour in zip(beside, SEEN, strict=True)]


def old(count: int) -> list[str]:
    """Captions of training scenes: what is to stay."""
    return [scene_at(8080, k)[1] for k in range(count)]


def alone(name: str, colour: str) -> Scene:
    """An object in the middle of a colour."""
    h, w = sprite(name, 40).shape[:2]
    return Scene("one", colour, (Placed(name, 40, (64 - w) // 2, (64 - h) // 2),))


def layouts(count: int) -> Callable[[Path], None]:
    """Scenes of the training world with their captions."""

    def several(folder: Path) -> None:
        for k in range(count):
            scene, words = scene_at(5050, k)
            _save(folder / f"{k:04}", render(scene), words)

    return several


def small(count: int) -> Callable[[Path], None]:
    """Scenes, and beside each what is left of it at a quarter of its size."""

    def several(folder: Path) -> None:
        layouts(count)(folder)
        for path in sorted(folder.glob("*.png")):
            shrunken(Image.open(path)).save(path.with_suffix(".condition.png"))

    return several


def shrunken(picture: Image.Image) -> Image.Image:
    """A picture through a quarter of its size and bicubic back."""
    y = F.avg_pool2d(to_tensor([picture]), 4)
    return to_pil(F.interpolate(y, scale_factor=4, mode="bicubic").clamp(-1, 1))[0]


def _save(stem: Path, picture: np.ndarray, words: str) -> None:
    Image.fromarray(picture).save(stem.with_suffix(".png"))
    stem.with_suffix(".txt").write_text(words)
