"""Pictures and their captions, wherever they lie: a folder, shards of a tar, columns; with every fault found on the way."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm_pipe import image
from ldm_pipe.errors import UsageError
from train.data import shards

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION_KEYS = ("text", "caption", "captions")


class Fault(NamedTuple):
    """Something wrong: where (a file, with its line after a colon), in which words, and whether it stops a training."""

    where: str
    words: str
    fatal: bool = True


class Columns(NamedTuple):
    """What a table calls the picture and its captions ("": what is usual)."""

    image: str = ""
    caption: str = ""


USUAL = Columns()


class Row(NamedTuple):
    """A sample: the name of its picture, its captions, where they stand, and the names of its mask and condition ("": none)."""

    name: str
    captions: tuple[str, ...]
    where: str
    mask: str = ""
    condition: str = ""


@dataclass(frozen=True, eq=False)
class Source:
    """Rows in a fixed order, the faults met while listing them, and the bytes of each name."""

    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]
    data: Callable[[str], bytes]

    def picture(self, name: str) -> Image.Image:
        """A picture as RGB: upright, transparency on white, 16 bits scaled to 8. Raises UsageError naming the file."""
        return image.decode(self.bytes(name), repr(name))

    def bytes(self, name: str) -> bytes:
        """The file's bytes. Raises UsageError naming the file."""
        try:
            return self.data(name)
        except OSError as error:
            raise UsageError(f"{name!r} cannot be read: {error.strerror or error}") from error

    def digest(self, name: str) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.bytes(name)).hexdigest()


def open_source(path: str, columns: Columns = USUAL) -> Source:
    """A folder of pictures (`.txt` sidecars, or metadata.jsonl / .csv), webdataset shards (a .tar, or a folder of them),
    parquet files, or what `datasets` saved to disk."""
    root = Path(path)
    if root.suffix == ".tar" and root.is_file():
        return _of_shards([root], columns)
    tars = sorted(root.glob("*.tar")) if root.is_dir() else []
    if tars:
        return _of_shards(tars, columns)
    table = next((root / t for t in TABLES if (root / t).is_file()), None)
    if table is None and root.exists():
        from train.data import arrow  # which needs what stands here

        found = arrow.files_of(root)
        if found is not None:
            return arrow.open_columns(root, *found, columns)
    if not root.is_dir():
        raise UsageError(f"data.path {path!r} is not a folder, nor a .tar, .parquet or .arrow file")
    rows, faults = _from_table(root, table, columns) if table else _from_sidecars(root)
    return Source(tuple(rows), tuple(faults), lambda name: (root / name).read_bytes())


def _pictures(root: Path) -> list[str]:
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(n for n in found if not n.startswith(".") and "/." not in n)


def _from_sidecars(root: Path) -> tuple[list[Row], list[Fault]]:
    """`photo.png` with `photo.txt`, and `photo.mask.png`, `photo.condition.png` where they exist."""
    names = _pictures(root)
    extra = {n for n in names if Path(n).stem.endswith((".mask", ".condition"))}
    rows, faults = [], []
    for name in (n for n in names if n not in extra):
        stem = name[: -len(Path(name).suffix)]
        words, fault = _read_words(root / f"{stem}.txt", f"{stem}.txt")
        faults += [fault] if fault else []
        parts = {k: next((n for n in extra if n.startswith(f"{stem}.{k}.")), "") for k in ("mask", "condition")}
        rows.append(Row(name, (words,) if words else (), f"{stem}.txt", **parts))
    stems = {r.name[: -len(Path(r.name).suffix)] for r in rows}
    for text in sorted(root.rglob("*.txt")):
        relative = text.relative_to(root).as_posix()
        if relative[:-4] not in stems:
            faults.append(Fault(relative, "is a caption without a picture", fatal=False))
    return rows, faults


def _read_words(path: Path, shown: str) -> tuple[str, Fault | None]:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split()), None
    except OSError:
        return "", None  # a missing caption is told of with the empty ones
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        return "", Fault(f"{shown}:{line}", "is not UTF-8 text")


def _from_table(root: Path, table: Path, columns: Columns) -> tuple[list[Row], list[Fault]]:
    rows: list[Row] = []
    faults: list[Fault] = []
    seen: dict[str, str] = {}
    for line, record in _records(table, faults):
        where = f"{table.name}:{line}"
        name = record.get(columns.image or "file_name")
        if not isinstance(name, str) or not name:
            wanted = columns.image or "file_name"
            faults.append(Fault(where, f"has no {wanted}; its fields are {', '.join(map(str, record)) or 'none'}"))
        elif not inside(root, name):
            faults.append(Fault(where, f"names {name!r}, which is not a file of the folder"))
        elif name in seen:
            faults.append(Fault(where, f"names {name!r} again, as {seen[name]} does"))
        else:
            seen[name] = where
            parts = {k: str(record[k]) for k in ("mask", "condition") if record.get(k)}
            faults += [Fault(where, f"{k} {n!r} is not a file of the folder") for k, n in parts.items() if not inside(root, n)]
            rows.append(Row(name, _captions(record, columns), where, **parts))
    used = set(seen) | {n for r in rows for n in (r.mask, r.condition)}
    faults += [Fault(n, f"is not named in {table.name}", fatal=False) for n in _pictures(root) if n not in used]
    return rows, faults


def inside(root: Path, name: str) -> bool:
    """Is this a file of the folder?"""
    try:
        file = (root / name).resolve()
        return root.resolve() in file.parents and file.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _records(table: Path, faults: list[Fault]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of a table; what cannot be read is added to `faults`."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = table.read_bytes()[: error.start].count(b"\n") + 1
        faults.append(Fault(f"{table.name}:{line}", "is not UTF-8 text"))
        return
    lines = text.splitlines()
    if table.suffix == ".csv":
        reader = csv.DictReader(lines)
        try:
            for record in reader:
                yield reader.line_num, {k: v for k, v in record.items() if k is not None}
        except csv.Error as error:
            faults.append(Fault(f"{table.name}:{reader.line_num}", f"is not CSV: {error}"))
        return
    for number, written in enumerate(lines, 1):
        if written.strip():
            try:
                record = json.loads(written)
            except (ValueError, RecursionError) as error:
                faults.append(Fault(f"{table.name}:{number}", f"is not JSON: {error}"))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                faults.append(Fault(f"{table.name}:{number}", "is not an object"))


def _captions(record: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    keys = (columns.caption,) if columns.caption else CAPTION_KEYS
    return words_of(next((record[k] for k in keys if record.get(k)), ()))


def words_of(found: Any) -> tuple[str, ...]:
    """One caption or a list of them, each in one line; empty ones are none."""
    several: Iterable[Any] = found if isinstance(found, list) else (found,) if found else ()
    return tuple(t for t in (" ".join(str(c).split()) for c in several) if t)


def _of_shards(tars: list[Path], columns: Columns) -> Source:
    members = [m for tar in tars for m in shards.index(tar)]
    places = {m.name: m for m in members}
    rows, faults = [], []
    for key, group in shards.grouped(members).items():
        pictures = [m for m in group if m.name.lower().endswith(tuple(SUFFIXES)) and not _is_extra(m.name)]
        if not pictures:
            faults.append(Fault(group[0].name, "has no picture beside it", fatal=False))
            continue
        words, where, fault = _shard_words(group, columns)
        faults += [fault] if fault else []
        extra = {k: next((m.name for m in group if f".{k}." in m.name), "") for k in ("mask", "condition")}
        rows.append(Row(pictures[0].name, words, where or key, **extra))
    return Source(tuple(rows), tuple(faults), lambda name: shards.read(places[name]))


def _is_extra(name: str) -> bool:
    return ".mask." in name or ".condition." in name


def _shard_words(group: list[shards.Member], columns: Columns) -> tuple[tuple[str, ...], str, Fault | None]:
    for member in group:
        try:
            if member.name.endswith((".txt", ".caption")):
                words = " ".join(shards.read(member).decode("utf-8").split())
                return ((words,) if words else ()), member.name, None
            if member.name.endswith(".json"):
                return _captions(json.loads(shards.read(member)), columns), member.name, None
        except (ValueError, AttributeError, RecursionError):
            return (), member.name, Fault(member.name, "is not readable text")
    return (), "", None
