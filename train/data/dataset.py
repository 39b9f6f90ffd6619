"""A data folder as training sees it: sizes by bucket, and for every visit its picture, geometry, caption and mask."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from PIL import Image

from ldm_pipe import image
from ldm_pipe.errors import UsageError
from train.data import geometry
from train.data.captions import caption_of
from train.data.geometry import Geometry, Size
from train.data.order import Order, Visit, stream
from train.data.source import Columns, Row, Source, open_source


@dataclass(frozen=True)
class Data:
    """Where the pictures are and how they are looked at.

    path: a folder (photo.png with photo.txt beside it, or metadata.jsonl / .csv), a .tar of webdataset or a folder of them, a
    .parquet file or a folder of them, or what `datasets` saved to disk. image_column, caption_column: what a table calls them
    ("": image and the like, text, caption or captions; file_name in .jsonl and .csv).
    side: a picture is cut to about side x side pixels (0: the model's own size). buckets: keep the picture's aspect ratio, up
    to `most` : 1; False cuts squares. crop: where a cut lies. flip: mirror half of the visits. dropout: share of visits
    without caption. shuffle, keep: shuffle the parts of a caption between commas, behind the first `keep`.
    allow_missing: pictures without caption are trained with an empty one. variants: how many cuts of a picture are cached.
    cache: folder of the cached latents ("": encode at every visit, cuts always fresh). half: cache them in 16 bits.
    """

    path: str
    side: int = 0
    buckets: bool = True
    most: float = 2.0
    crop: Literal["centre", "random"] = "centre"
    flip: bool = False
    dropout: float = 0.1
    shuffle: bool = False
    keep: int = 0
    allow_missing: bool = False
    variants: int = 1
    cache: str = "runs/cache"
    half: bool = True
    image_column: str = ""
    caption_column: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"data.dropout is {self.dropout:g}; it takes 0 to 1")
        if self.variants < 1 or self.most < 1 or self.side < 0 or self.keep < 0:
            raise UsageError("data: variants and most take 1 or more, side and keep 0 or more")

    @property
    def columns(self) -> Columns:
        """What tables call their columns."""
        return Columns(self.image_column, self.caption_column)

    def sizes(self, side: int, step: int) -> tuple[Size, ...]:
        """The sizes that pictures are cut to. step: what a side must be a multiple of."""
        side = self.side or side
        if side % step:
            raise UsageError(f"data.side is {side}; this model takes multiples of {step}")
        return geometry.bucket_sizes(side, step, self.most) if self.buckets else ((side, side),)


class Seen(NamedTuple):
    """One visit: which, how it is cut, and what is said."""

    row: int
    visit: int
    geometry: Geometry
    caption: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows with their sizes in pixels and their SHA-256. Everything of a visit is a pure function of (seed, sample, visit)."""

    data: Data
    source: Source
    rows: tuple[Row, ...]
    originals: tuple[Size, ...]
    digests: tuple[str, ...]
    sizes: tuple[Size, ...]
    group: int = 1
    order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        buckets: dict[Size, list[int]] = {s: [] for s in self.sizes}
        for i, original in enumerate(self.originals):
            buckets[geometry.nearest(original, self.sizes)].append(i)
        object.__setattr__(self, "order", Order(list(buckets.values()), self.group))

    @classmethod
    def open(cls, data: Data, side: int, step: int, group: int = 1) -> Dataset:
        """Read the list, the sizes and the digests; no picture is decoded. Raises UsageError on the first fault."""
        source = open_source(data.path, data.columns)
        fatal = [f for f in source.faults if f.fatal]
        silent = [r for r in source.rows if not r.captions and not data.allow_missing]
        hint = "`python -m train check` lists all faults"
        if fatal:
            raise UsageError(f"{data.path}: {fatal[0].where} {fatal[0].words}; {hint}")
        if silent:
            words = f"{data.path}: {len(silent)} of {len(source.rows)} pictures have no caption, first {silent[0].name!r}"
            raise UsageError(f"{words}; data.allow_missing=true trains them without; {hint}")
        if not source.rows:
            raise UsageError(f"data.path {data.path!r} holds no pictures")
        bytes_ = (source.bytes(r.name) for r in source.rows)
        facts = [
            (image.upright_size(b, repr(r.name)), hashlib.sha256(b).hexdigest())
            for b, r in zip(bytes_, source.rows, strict=True)
        ]
        originals, digests = zip(*facts, strict=True)
        return cls(data, source, source.rows, originals, digests, data.sizes(side, step), group)

    def part(self, rows: Sequence[int]) -> Dataset:
        """Some of the rows as a data set of their own."""
        some = [tuple(values[i] for i in rows) for values in (self.rows, self.originals, self.digests)]
        return Dataset(self.data, self.source, some[0], some[1], some[2], self.sizes, self.group)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def facts(self) -> str:
        """SHA-256 of everything that the order of samples and their content follow from."""
        lines = [f"{d} {r.captions} {r.mask}" for d, r in zip(self.digests, self.rows, strict=True)]
        return hashlib.sha256("\n".join([*lines, str(self.sizes)]).encode()).hexdigest()

    def seen(self, seed: int, number: int) -> Seen:
        """Sample number `number` of the run."""
        visit = self.order.at(seed, number)
        rng = stream(seed, "caption", visit.row, visit.visit)
        d = self.data
        words = caption_of(self.rows[visit.row].captions, rng, d.dropout, d.shuffle, d.keep)
        return Seen(visit.row, visit.visit, self.cut(seed, visit), words)

    def cut(self, seed: int, visit: Visit) -> Geometry:
        """The geometry of a visit; where latents are cached, one of the first `variants`, the same whatever the seed."""
        cached, original = bool(self.data.cache), self.originals[visit.row]
        variant = visit.visit % self.data.variants if cached else visit.visit
        rng = stream(0 if cached else seed, "geometry", visit.row, variant)
        size = geometry.nearest(original, self.sizes)
        return geometry.draw(original, size, rng, self.data.crop == "random", self.data.flip)

    def picture(self, seen: Seen) -> Image.Image:
        """The cut picture of a visit, RGB."""
        return seen.geometry.apply(self.source.picture(self.rows[seen.row].name))

    def mask(self, seen: Seen) -> Image.Image | None:
        """The mask of a visit, cut at the same place, grey: white counts in the loss. None where there is none."""
        name = self.rows[seen.row].mask
        return seen.geometry.apply(self.source.picture(name)).convert("L") if name else None

    def condition(self, seen: Seen) -> Image.Image | None:
        """The condition picture of a visit (edges, a pose), cut at the same place. None where there is none."""
        name = self.rows[seen.row].condition
        return seen.geometry.apply(self.source.picture(name)) if name else None

    def name(self, seen: Seen) -> str:
        """What errors call a visit."""
        return self.rows[seen.row].name

    def captions(self) -> Sequence[str]:
        """Every caption that visits can show, where parts are not shuffled; the empty one first."""
        return list(dict.fromkeys(["", *(c for r in self.rows for c in r.captions)]))
