"""Where images go: names by template, checked before anything is computed, and written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm_pipe import files
from ldm_pipe.errors import EnvironmentFault, UsageError, unknown

LONGEST = 255
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
FIELDS = ("prompt", "seed", "index", "sampler", "spacing", "steps", "scale", "width", "height", "model")
NAME = "{prompt}-{seed}.png"
_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Target:
    """A folder and the template of a name in it, such as "{prompt}-{seed}.png"; a name without fields is one file."""

    folder: Path
    name: str = NAME
    force: bool = False

    @classmethod
    def of(cls, given: str | None, count: int, force: bool = False) -> Target:
        """Read --output for `count` files. Raises UsageError or EnvironmentFault on what could not be written."""
        given = "outputs" if given is None else given
        _check_name(given)
        path = Path(given)
        if path.is_dir() or not (path.suffix or set("{}") & set(path.name)):
            target = cls(path, NAME, force)
        else:
            _check_template(path, given, count, force)
            target = cls(path.parent, path.name, force)
        _check_folder(target.folder, given)
        return target

    @property
    def format(self) -> str:
        """ "PNG", "JPEG" or "WEBP"."""
        return FORMATS[Path(self.name).suffix.lower()]

    def write(self, data: bytes, values: Mapping[str, object], suffix: str = "") -> Path:
        """Write one file; `suffix` goes before the ending. A templated name that is taken gets a number, unless `force`."""
        stem, ending = os.path.splitext(_FIELD.sub(lambda m: _value(m[1], values), self.name))
        stem = _cut(stem, LONGEST - len(ending) - len(suffix) - 5) + suffix
        if not _FIELD.search(self.name):
            return files.write(self.folder / f"{stem}{ending}", data, replace=self.force)
        for k in range(1, 10_000):
            name = f"{stem}{'' if k == 1 else f'-{k}'}{ending}"
            try:
                return files.write(self.folder / name, data, replace=self.force)
            except UsageError:
                continue
        raise UsageError(f"{stem}{ending} and 9,998 numbered names are taken in {str(self.folder)!r}; choose another --output")


def slug(text: str) -> str:
    """A text as part of a file name: lower case letters, digits and hyphens, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "image"


def _value(field: str, values: Mapping[str, object]) -> str:
    name, _, width = field.partition(":")
    value = values[name]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return slug(value) if isinstance(value, str) else text.zfill(int(width or 0))


def _cut(text: str, size: int) -> str:
    """At most `size` bytes of a name, no letter cut in two."""
    return os.fsencode(text)[: max(1, size)].decode("utf-8", "ignore")


def _check_template(path: Path, given: str, count: int, force: bool) -> None:
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--output {given!r}: a file ends in {', '.join(FORMATS)}; give such a name, or a folder")
    if "{" in str(path.parent) or "}" in str(path.parent):
        raise UsageError(f"--output {given!r}: fields in braces belong to the file's name, not to its folder")
    fields = _FIELD.findall(path.name)
    for field in fields:
        name, colon, width = field.partition(":")
        if name not in FIELDS:
            raise UsageError(f"--output {given!r}: " + unknown("field of a name", name, FIELDS))
        if colon and not re.fullmatch(r"0?[1-9]", width):
            raise UsageError(f"--output {given!r}: {{{field}}} is not of the form {{index:04}}, with 1 to 9 digits")
    if re.search(r"[{}]", _FIELD.sub("", path.name)):
        raise UsageError(f"--output {given!r}: a brace is left open; fields are written {{seed}}")
    if not fields and count > 1:
        raise UsageError(
            f"--output {given!r} is one file, but {count} are made (a sheet counts too); give a folder, or a name with {{seed}}"
        )
    if not fields and path.exists() and not force:
        raise UsageError(f"--output {given!r} exists; --force overwrites it")


def _check_name(given: str) -> None:
    if not given:
        raise UsageError("--output is empty; give a file or a folder")
    try:
        long = any(len(os.fsencode(part)) > LONGEST for part in Path(given).parts)
    except UnicodeEncodeError as error:
        raise UsageError(f"--output {given[:60]!r} is not a name this file system can hold") from error
    if "\0" in given or long:
        raise UsageError(f"--output {given[:60]!r}: a name has at most {LONGEST} bytes and no NUL")


def _check_folder(folder: Path, given: str) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise EnvironmentFault(f"--output {given!r} cannot be reached: {error.strerror}") from error
    if not folder.is_dir():
        raise UsageError(f"--output {given!r}: {str(folder)!r} is a file; give an image's name or a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise EnvironmentFault(f"--output {given!r}: the folder {str(folder)!r} cannot be written to")
