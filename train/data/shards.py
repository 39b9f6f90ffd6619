"""Webdataset shards, each sample at its number: a tar file is listed once, then read at known places.

The layout is webdataset's: files of one sample are neighbours with one key, the name up to its first dot.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ldm_pipe import files
from ldm_pipe.errors import EnvironmentFault, UsageError


class Member(NamedTuple):
    """A file of a shard: "shard.tar/name", where its bytes begin and how many they are."""

    tar: str
    name: str
    offset: int
    size: int


def index(tar: Path) -> list[Member]:
    """All files of a tar. The list is kept beside it as `.<name>.index.json` (where that may be written) and made anew when
    the tar's size or time changes. Raises UsageError on a file that is no whole tar."""
    stat = tar.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    kept = tar.with_name(f".{tar.name}.index.json")
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["stamp"] == stamp:
            kept_members = [Member(str(tar), *m) for m in found["members"]]
            if all(0 <= m.offset <= m.offset + m.size <= stat.st_size for m in kept_members):
                return kept_members
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [(f"{tar.name}/{m.name}", m.offset_data, m.size) for m in archive if m.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"{str(tar)!r} is not a whole, uncompressed tar file: {error}") from error
    if members and members[-1][1] + members[-1][2] > stat.st_size:
        raise UsageError(f"{str(tar)!r} is cut off in {members[-1][0]!r}")
    with contextlib.suppress(EnvironmentFault):  # a folder that is only read: listed again next time
        files.write(kept, json.dumps({"stamp": stamp, "members": members}).encode(), replace=True)
    return [Member(str(tar), *m) for m in members]


def grouped(members: Sequence[Member]) -> dict[str, list[Member]]:
    """The files of each sample, by shard and key, in the order of the shards."""
    found: dict[str, list[Member]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        found.setdefault(f"{folder}/{name.split('.')[0]}", []).append(member)
    return found


def read(member: Member) -> bytes:
    """The bytes of one file."""
    with open(member.tar, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)
