"""Parquet files and Hugging Face datasets on disk (`save_to_disk`): columns of pictures and captions, each row at its number.

A sample is called "train.parquet[17]": row 17 of that file, counted from 0 as `dataset[17]` counts. Files of `save_to_disk` are
mapped into memory, so any row costs its own bytes. Parquet is read by row groups, the last few of which are kept.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from ldm_pipe.errors import UsageError, unknown
from train.data.source import CAPTION_KEYS, Columns, Fault, Row, Source, inside, words_of

IMAGE_KEYS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
EXTRA_KEYS = {"mask": ("mask",), "condition": ("condition", "conditioning_image")}
LARGEST_GROUP = 256 << 20  # bytes of a row group from which a note says that rows are costly
PART = re.compile(r"(.+)\[(\d+)\](?:\.(mask|condition))?")
SPLIT = re.compile(r"(.+?)-\d+-of-\d+")


def files_of(root: Path) -> tuple[list[Path], list[Fault]] | None:
    """The files of a data set in columns, in order, and notes on what is left out; None where `root` is none."""
    if root.is_file():
        return ([root], []) if root.suffix in (".parquet", ".arrow") else None
    if splits := _told(root / "dataset_dict.json", "splits"):
        split, notes = _one_split(root, splits)
        return (files_of(root / split) or ([], []))[0], notes
    if named := _told(root / "state.json", "_data_files"):
        return [root / Path(f["filename"]).name for f in named], []
    found = sorted(p for p in root.rglob("*.parquet") if p.name != "metadata.parquet")
    prefixes = {p: m.group(1) for p in found if (m := SPLIT.fullmatch(p.stem))}
    if len(set(prefixes.values())) > 1:
        split, notes = _one_split(root, sorted(set(prefixes.values())))
        return [p for p in found if prefixes.get(p, split) == split], notes
    return (found, []) if found else None


def _told(file: Path, key: str) -> Any:
    """A value of a JSON file, None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def _one_split(root: Path, splits: Sequence[str]) -> tuple[str, list[Fault]]:
    if len(splits) == 1:
        return splits[0], []
    if "train" not in splits:
        raise UsageError(f"{str(root)!r} holds the splits {', '.join(splits)}: give data.path one of them")
    return "train", [Fault(str(root), f"holds the splits {', '.join(splits)}; train is read", fatal=False)]


def open_columns(root: Path, files: Sequence[Path], notes: Sequence[Fault], columns: Columns) -> Source:
    """The rows of the files. Faults name the file, and the row where there is one. Raises UsageError without pyarrow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{str(root)!r} is read by the package pyarrow: pip install 'ldm_pipe[data]'") from error
    base = root if root.is_dir() else root.parent
    rows: list[Row] = []
    faults = list(notes)
    chosen: dict[str, tuple[Path, dict[str, str]]] = {}
    for file in files:
        shown = file.relative_to(base).as_posix()
        try:
            roles = _roles(file, shown, columns)
            chosen[shown] = file, roles
            faults += _costly(file, shown)
            rows += _rows(file, shown, roles, faults)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these
            what = str(error) if isinstance(error, UsageError) else f"cannot be read: {str(error).splitlines()[0]}"
            faults.append(Fault(shown, what))

    def data(name: str) -> bytes:
        whole = PART.fullmatch(name)
        if whole is None or whole.group(1) not in chosen:
            raise OSError("no such row")
        file, roles = chosen[whole.group(1)]
        return _bytes(_cell(file, roles[whole.group(3) or "image"], int(whole.group(2))), base)

    return Source(tuple(rows), tuple(faults), data)


# --- columns


def _roles(file: Path, shown: str, columns: Columns) -> dict[str, str]:
    """The column of each role ("image", "mask", "condition", "caption") that a file has. Raises UsageError."""
    schema = _schema(file)
    pictures = [f.name for f in schema if _holds_pictures(f.type)]
    found = {role: c for role, keys in EXTRA_KEYS.items() for c in keys if c in pictures}
    left = [c for c in pictures if c not in found.values()]
    if columns.image and columns.image not in schema.names:
        raise UsageError(unknown("column", columns.image, schema.names))
    image = columns.image or next((k for k in IMAGE_KEYS if k in left), left[0] if len(left) == 1 else "")
    if image not in pictures:
        which = f"has several columns of pictures, {', '.join(left)}" if left else "has no column of pictures"
        raise UsageError(f"{which}; data.image_column names one of {', '.join(schema.names)}")
    if columns.caption and columns.caption not in schema.names:
        raise UsageError(unknown("column", columns.caption, schema.names))
    caption = columns.caption or next((k for k in (*CAPTION_KEYS, *_classes(schema)) if k in schema.names), "")
    return {**found, "image": image, **({"caption": caption} if caption else {})}


def _holds_pictures(kind: Any) -> bool:
    """Bytes, or the structure of bytes and path that `datasets` stores."""
    import pyarrow.types as t

    if t.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return t.is_binary(kind) or t.is_large_binary(kind)


def _classes(schema: Any) -> dict[str, list[str]]:
    """The columns of class numbers that `datasets` names the classes of."""
    try:
        told = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {n: f["names"] for n, f in told.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (TypeError, KeyError, ValueError):
        return {}


# --- rows


def _rows(file: Path, shown: str, roles: dict[str, str], faults: list[Fault]) -> Iterator[Row]:
    extra = [role for role in ("mask", "condition") if role in roles]
    names = _classes(_schema(file)).get(roles.get("caption", ""))
    for i, value in enumerate(_values(file, shown, roles.get("caption", ""), faults)):
        name = f"{shown}[{i}]"
        said = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
        yield Row(name, words_of(said), name, **{role: f"{name}.{role}" for role in extra})


def _values(file: Path, shown: str, column: str, faults: list[Fault]) -> Iterator[Any]:
    """The values of a small column ("": nothing for every row); what is no text is a fault of its row."""
    if not column:
        opened = _opened(file, _stamp(file))
        yield from [None] * (opened.metadata.num_rows if file.suffix == ".parquet" else opened.num_rows)
        return
    for i, value in enumerate(_column(file, column)):
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            faults.append(Fault(f"{shown}[{i}]", "is not UTF-8 text"))
            yield None


def _bytes(value: Any, base: Path) -> bytes:
    """The bytes of a cell; where it only names a file, that file beside the data set."""
    if isinstance(value, dict):
        path = value.get("path")
        if value.get("bytes") is None and path and inside(base, path):
            return (base / path).read_bytes()
        if value.get("bytes") is None and path:
            raise OSError(f"it holds no picture, only the path {path!r}")
        value = value.get("bytes")
    if not value:
        raise OSError("the row holds no picture")
    return bytes(value)


# --- files


Stamp = tuple[int, int]


def _stamp(file: Path) -> Stamp:
    """Size and time: a file that changed is opened anew, so that no page of a shorter one is touched."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _schema(file: Path) -> Any:
    opened = _opened(file, _stamp(file))
    return opened.schema_arrow if file.suffix == ".parquet" else opened.schema


def _column(file: Path, column: str) -> Any:
    opened = _opened(file, _stamp(file))
    if file.suffix == ".parquet":
        opened = opened.read([column], use_threads=False)
    return opened.column(column)


def _cell(file: Path, column: str, row: int) -> Any:
    """One value. Raises OSError where the file is damaged."""
    try:
        stamp = _stamp(file)
        if file.suffix != ".parquet":
            return _opened(file, stamp).column(column)[row].as_py()
        ends = _ends(file, stamp)
        group = bisect_right(ends, row)
        return _group(file, stamp, column, group)[row - (ends[group - 1] if group else 0)].as_py()
    except (ValueError, IndexError) as error:
        raise OSError(str(error).splitlines()[0]) from error


def _costly(file: Path, shown: str) -> list[Fault]:
    if file.suffix != ".parquet":
        return []
    meta = _opened(file, _stamp(file)).metadata
    largest = max((meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)), default=0)
    if largest <= LARGEST_GROUP:
        return []
    words = f"has a row group of {largest >> 20} MB, which is read whole for any of its pictures; save_to_disk makes rows cheap"
    return [Fault(shown, words, fatal=False)]


@lru_cache(maxsize=1024)
def _opened(file: Path, stamp: Stamp) -> Any:
    """A parquet file, or the table of an Arrow file mapped into memory (a stream, as `save_to_disk` writes it, or a file)."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(file)  # it reads at given places: processes that fork share none
    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source).read_all()


@lru_cache(maxsize=1024)
def _ends(file: Path, stamp: Stamp) -> list[int]:
    """Rows up to the end of each row group of a parquet file."""
    meta = _opened(file, stamp).metadata
    return list(accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))


@lru_cache(maxsize=4)
def _group(file: Path, stamp: Stamp, column: str, group: int) -> Any:
    return _opened(file, stamp).read_row_group(group, [column], use_threads=False).column(column)
