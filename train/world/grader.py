"""Reads a scene back from its pixels by matching sprites: which object stands where, on which colour, or neither.

No network and no caption takes part. The best fit of all sprites, sizes and places is found by correlation
(coarse at half resolution over a bank of every sprite, then fine around the best), taken out of the picture, and so on
until nothing is left. What no sprite explains is reported as such: a morph of two objects or a blob has no name.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import scipy.fft
from scipy.ndimage import binary_opening, gaussian_filter, label

from train.world.scenes import COLOURS, SIZE, Scene
from train.world.sprites import objects, sprite

# Pictures are compared blurred: what a codec loses or adds is fine detail. Templates are blurred more than pictures
# (1.3 against 1.0 pixels), for a generated picture has already lost some sharpness of its own.
BLUR_TEMPLATE, BLUR_IMAGE, PAD = 1.3, 1.0, 4
SIZES = tuple(dict.fromkeys(round(18 * 1.1**k) for k in range(11)))
MISFIT = 1.0  # weight of unexplained energy under a sprite, beside the energy it explains
FAR = 40.0  # RGB distance at which a background is none of the palette (its closest two, blue and teal, are 81 apart)
# A sprite is rejected for its error, or for error times doubt (how close the next name comes, 1 is level). Scenes through
# the codec stay below 0.01 in the product, at JPEG quality 40 below 0.0175; even blends of two sprites begin at 0.02.
ERROR, DOUBTFUL = 0.12, 0.0175
FLOOR = 3 * 20.0**2  # energy per pixel added to a sprite's own: pale sprites on a pale ground drown in codec noise
LEFT, AREA = 28.0, 12  # what counts as left over: RMS over the channels, and pixels
FAINT, PALE = 10.0, 0.25  # RMS from which a patch may be a pale sprite, and the most of its energy that noise may be
APART = 8.0  # pixels between the middles of two objects that stand in a relation (in scenes at least 20)
MOST, BRANCHES, TOP = 4, 3, 8  # objects per picture; places tried per object; names refined per place

Array = np.ndarray


@dataclass(frozen=True)
class Found:
    """Something that stands in a picture.

    name: the object, or None where no sprite matches (the reject class). x, y: its centre in pixels from the top left.
    size: its longer side in pixels. error: share of its contrast that the sprite leaves unexplained, 0..1 (None: 1).
    """

    name: str | None
    x: float
    y: float
    size: float
    error: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: the background's palette name (None: none of them) and everything that stands on it."""

    colour: str | None
    found: tuple[Found, ...]


@dataclass(frozen=True)
class _Bank:
    """Sprites as spectra (complex64 [side,side//2+1,K,5]) with the moments that give their energy on any ground.

    With the sprite's colour c (premultiplied) and alpha a, the planes are c + m a c (3), a + m a a, a; m = MISFIT.
    """

    keys: tuple[tuple[str, int], ...]
    spectra: Array
    moments: Array  # [K,5]: sums of (1 + m a) times cc, ca (3), aa
    side: int

    def scores(self, field: Array, ground: Array) -> Array:
        """[K,side,side]: energy of `field` (picture less ground) explained, less MISFIT x energy left under the sprite.

        That is |f|^2 - |f - t|^2 - m sum a (f - t)^2 with t = c - a ground, for every middle (row, column) of t.
        """
        planes = np.concatenate([2 * field, -2 * (field @ ground)[..., None], -MISFIT * (field**2).sum(-1, keepdims=True)], -1)
        spectrum = scipy.fft.rfft2(planes.astype(np.float32), axes=(0, 1))
        product = np.ascontiguousarray((self.spectra @ spectrum[..., None])[..., 0].transpose(2, 0, 1))
        fits = scipy.fft.irfft2(product, s=(self.side, self.side), overwrite_x=True)
        energy = self.moments @ np.array([1.0, *(-2 * ground), (ground**2).sum()])
        fits -= energy[:, None, None].astype(np.float32)
        return np.asarray(fits)


@dataclass(frozen=True)
class _Fit:
    found: Found
    drawn: Array  # [64,64,3]: what the sprite adds to the ground
    alpha: Array  # [64,64]
    accepted: bool


@lru_cache(maxsize=4096)
def _template(name: str, size: int) -> Array:
    """A blurred sprite, float32 [h,w,4] with h and w multiples of 4, so that its middle survives halving."""
    s = sprite(name, size)
    h, w = s.shape[:2]
    canvas = np.zeros((-(-(h + 2 * PAD) // 4) * 4, -(-(w + 2 * PAD) // 4) * 4, 4), dtype=np.float32)
    top, left = (canvas.shape[0] - h) // 2, (canvas.shape[1] - w) // 2
    canvas[top : top + h, left : left + w] = s
    return np.asarray(gaussian_filter(canvas, (BLUR_TEMPLATE, BLUR_TEMPLATE, 0)))


def _at_origin(template: Array, side: int) -> Array:
    """[side,side,4]: the template with its middle at (0, 0), wrapped around the edges as the transform expects."""
    canvas = np.zeros((side, side, 4), dtype=np.float32)
    h, w = template.shape[:2]
    canvas[:h, :w] = template
    return np.roll(canvas, (-(h // 2), -(w // 2)), (0, 1))


def _halved(field: Array) -> Array:
    h, w, c = field.shape
    return np.asarray(field.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3)))


@lru_cache(maxsize=1024)
def _spectrum(name: str, size: int, side: int) -> tuple[Array, Array]:
    template = _template(name, size)
    canvas = _at_origin(template if side == SIZE else _halved(template), side)
    rgb, alpha = canvas[..., :3], canvas[..., 3:]
    weight = 1 + MISFIT * alpha
    moments = np.array([(weight * rgb**2).sum(), *(weight * rgb * alpha).sum((0, 1)), (weight * alpha**2).sum()])
    planes = np.concatenate([weight * canvas, alpha], axis=-1)
    return np.conj(scipy.fft.rfft2(planes, axes=(0, 1))), moments


def _bank(keys: tuple[tuple[str, int], ...], side: int) -> _Bank:
    made = [_spectrum(name, size, side) for name, size in keys]
    spectra = np.ascontiguousarray(np.stack([m[0] for m in made], axis=2))
    return _Bank(keys, spectra, np.stack([m[1] for m in made]), side)


@cache
def _coarse() -> tuple[_Bank, ...]:
    """All sprites at half resolution, one bank per size (small enough to stay in a core's cache)."""
    return tuple(_bank(tuple((name, size) for name in objects("all")), SIZE // 2) for size in SIZES)


def _ground(image: Array) -> tuple[str | None, Array]:
    """The background's name and its measured RGB (float64 [3]), from the three outermost rows and columns."""
    edge = np.ones((SIZE, SIZE), dtype=bool)
    edge[3:-3, 3:-3] = False
    pixels = image[edge].astype(np.float64)
    distance = np.linalg.norm(pixels[:, None] - np.array(list(COLOURS.values())), axis=-1)
    nearest = np.where(distance.min(1) < FAR, distance.argmin(1), len(COLOURS))
    votes = np.bincount(nearest, minlength=len(COLOURS) + 1)[:-1]
    if votes.max() < 0.4 * len(pixels):
        return None, pixels.mean(0)
    return list(COLOURS)[int(votes.argmax())], np.median(pixels[nearest == votes.argmax()], axis=0)


def _refine(field: Array, ground: Array, scores: Array) -> tuple[_Fit, tuple[int, int]]:
    """The best sprite at the place of the best coarse score [sizes,110,32,32], refined in size and to the pixel.

    Also returns that place, (row, column) at half resolution.
    """
    names = objects("all")
    y, x = (int(i) for i in np.unravel_index(int(scores.argmax()), scores.shape)[2:])
    near = scores[:, :, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].max((2, 3))
    keys = []
    for i in np.argsort(-near.max(0))[:TOP]:
        size = SIZES[int(near[:, i].argmax())]
        step = max(1, round(size * 0.05))
        keys += [(names[i], s) for s in range(size - step, size + step + 1)]
    top, left = max(0, 2 * y - 7), max(0, 2 * x - 7)
    bank = _bank(tuple(keys), SIZE)
    window = bank.scores(field, ground)[:, top : top + 15, left : left + 15]
    best = window.max((1, 2))
    k = int(best.argmax())
    row, column = np.unravel_index(int(window[k].argmax()), window.shape[1:])
    rival = max(b for b, (name, _) in zip(best, keys, strict=True) if name != keys[k][0])
    lead = float(best[k] - rival) / (1 + MISFIT)
    return _fit(field, ground, keys[k], (top + int(row), left + int(column)), lead), (y, x)


def _fit(field: Array, ground: Array, key: tuple[str, int], at: tuple[int, int], lead: float) -> _Fit:
    """Judge one sprite with its middle at (row, column). lead: energy by which it beats every other name there."""
    placed = np.roll(_at_origin(_template(*key), SIZE), at, (0, 1))
    alpha = placed[..., 3]
    drawn = placed[..., :3] - alpha[..., None] * ground
    left = float((((field - drawn) ** 2).sum(-1) * alpha).sum())
    energy, area = float((drawn**2).sum()), float(alpha.sum())
    error = left / (energy + FLOOR * area)
    doubt = left / max(left + lead, 1e-9)
    h, w = sprite(*key).shape[:2]
    # An odd side sits half a pixel before the middle of its even canvas.
    found = Found(key[0], at[1] - (w % 2) / 2, at[0] - (h % 2) / 2, float(key[1]), min(1.0, error))
    visible = energy > 3 * FAINT**2 * area and left < PALE * energy
    return _Fit(found, drawn, alpha, visible and error < ERROR and error * doubt < DOUBTFUL)


def _leftover(field: Array, fits: list[_Fit], level: float = LEFT) -> tuple[Array, int]:
    """Labelled map and number of the patches of `field` that stand out of the ground, beside the fits' sprites."""
    open_ = np.ones((SIZE, SIZE), dtype=bool)
    for fit in fits:
        open_ &= fit.alpha < 0.1
    mask = binary_opening((np.sqrt((field**2).mean(-1)) > level) & open_, np.ones((3, 3)))
    labels, number = label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=number + 1)
    keep = [i for i in range(1, number + 1) if areas[i] >= AREA]
    renamed = np.zeros(number + 1, dtype=np.int64)
    renamed[keep] = np.arange(1, len(keep) + 1)
    return renamed[labels], len(keep)


def _explain(field: Array, ground: Array, fits: list[_Fit]) -> tuple[Array, list[_Fit]]:
    """The field less every sprite that matches, and those sprites: depth first, the strongest first.

    A sprite that spans two objects can be the strongest, so where it is rejected the next place is tried, and where
    the first one leads to leftovers another beginning may lead to none.
    """
    best = field, fits
    if len(fits) == MOST or not _leftover(field, fits, FAINT)[1]:
        return best
    half = _halved(field)
    scores = np.stack([bank.scores(half, ground) for bank in _coarse()])
    for _ in range(BRANCHES):
        fit, (y, x) = _refine(field, ground, scores)
        if fit.accepted:
            deeper = _explain(field - fit.drawn, ground, [*fits, fit])
            if best[1] is fits or (deeper[0] ** 2).sum() < (best[0] ** 2).sum():
                best = deeper
            if fits or not _leftover(*best)[1]:
                break
        scores[:, :, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = -np.inf
    return best


def read(image: np.ndarray) -> Reading:
    """Say what a picture shows: the objects in the order found, then whatever else stands out of the ground, unnamed.

    image: uint8 [64,64,3], RGB. Raises ValueError for any other shape or type.
    """
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8 [{SIZE},{SIZE},3], not {image.dtype} {list(image.shape)}")
    colour, ground = _ground(image)
    if colour is None:
        return Reading(None, (Found(None, SIZE / 2, SIZE / 2, float(SIZE), 1.0),))
    field = np.asarray(gaussian_filter(image - ground, (BLUR_IMAGE, BLUR_IMAGE, 0), mode="nearest"))
    left, fits = _explain(field, ground, [])
    labels, number = _leftover(left, fits)
    found = [fit.found for fit in fits]
    for i in range(1, number + 1):
        rows, columns = np.nonzero(labels == i)
        side = max(int(np.ptp(rows)), int(np.ptp(columns))) + 1
        found.append(Found(None, float(columns.mean()) + 0.5, float(rows.mean()) + 0.5, float(side), 1.0))
    return Reading(colour, tuple(found))


def _relation(a: Found, b: Found) -> str:
    """Where a stands to b, along the axis on which they are further apart; nowhere where they nearly coincide."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < APART:
        return ""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def holds(reading: Reading, scene: Scene) -> bool:
    """True where a reading says exactly what the captions of a scene say: the colour, these objects and nothing else,
    as many as commanded, and the commanded relation (sizes and places beyond it are no part of a caption)."""
    wanted = Counter(p.name for p in scene.placed)
    if reading.colour != scene.colour or Counter(f.name for f in reading.found) != wanted:
        return False
    if scene.kind != "two":
        return True
    by_name = {f.name: f for f in reading.found}
    first, second = (by_name[name] for name in scene.names)
    return _relation(first, second) == scene.relation


def grade(image: np.ndarray, scene: Scene) -> bool:
    """True where a picture (uint8 [64,64,3]) shows exactly what the captions of `scene` say."""
    return holds(read(image), scene)
