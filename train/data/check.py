"""`python -m train check`: every fault of a recipe and its data, with file and line, before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from ldm_pipe import image
from ldm_pipe.errors import LdmError
from train.data import geometry
from train.data.dataset import Data
from train.data.geometry import Size
from train.data.source import Fault, Row, Source, open_source

Length = Callable[[str], int]


def check_data(data: Data, sizes: Sequence[Size], batch: int, length: Length | None = None, window: int = 0) -> list[Fault]:
    """All faults of a data folder. sizes: of the buckets; batch: samples of one step; length: tokens of a caption, of which
    the encoder sees `window`."""
    try:
        source = open_source(data.path, data.columns)
    except LdmError as error:
        return [Fault(data.path, str(error))]
    faults = list(source.faults)
    if not source.rows:
        return [*faults, Fault(data.path, "holds no pictures: an epoch would have no steps")]
    faults += [f for row in source.rows for f in _caption_faults(row, data, length, window)]
    found = _pictures(source, faults)
    faults += _buckets(found, sizes, batch)
    return faults


def _caption_faults(row: Row, data: Data, length: Length | None, window: int) -> list[Fault]:
    if not row.captions:
        words = f"{row.name!r} has no caption, or an empty one"
        return [Fault(row.where or row.name, words, fatal=not data.allow_missing)]
    if length is None:
        return []
    over = [(c, length(c) - window) for c in row.captions]
    return [
        Fault(row.where, f"{more} token(s) of the caption are behind the encoder's window of {window}: ...{c[-40:]!r}", False)
        for c, more in over
        if more > 0
    ]


def _pictures(source: Source, faults: list[Fault]) -> dict[str, Size]:
    """Sizes of the pictures that can be read, all of them decoded whole; damaged ones and duplicates go into `faults`."""
    sizes: dict[str, Size] = {}
    first: dict[str, str] = {}
    for row in source.rows:
        for name in filter(None, (row.name, row.mask, row.condition)):
            try:
                picture = source.picture(name)
            except LdmError as error:
                faults.append(Fault(name, str(error).removeprefix(f"{name!r} ")))
                continue
            if name == row.name:
                sizes[name] = picture.size
                same = first.setdefault(image.digest(picture), name)
                if same != name:
                    faults.append(Fault(name, f"shows the same picture as {same!r}", fatal=False))
    return sizes


def _buckets(found: dict[str, Size], sizes: Sequence[Size], batch: int) -> list[Fault]:
    faults = []
    chosen = {name: geometry.nearest(size, sizes) for name, size in found.items()}
    for name, size in found.items():
        scale = max(w / o for w, o in zip(chosen[name], size, strict=True))
        if scale > 1:
            faults.append(Fault(name, f"is {size[0]}x{size[1]} and is enlarged {scale:.2g} times", fatal=False))
    for (w, h), count in sorted(Counter(chosen.values()).items()):
        if count < batch:
            words = f"has {count} picture(s) and a step takes {batch}: they are seen several times in one step; a smaller "
            words += "job.batch, data.buckets = false or more pictures avoid that"
            faults.append(Fault(f"bucket {w}x{h}", words, fatal=False))
    return faults
