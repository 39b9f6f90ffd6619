"""Where images go: names, checked before anything is computed, and written whole or not at all."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ldm_pipe import files
from ldm_pipe.errors import EnvironmentFault, UsageError

LONGEST = 255


@dataclass(frozen=True)
class Target:
    """A .png file for one image, or a folder in which names are made from prompt and seed."""

    path: Path
    single: bool
    force: bool = False

    @classmethod
    def of(cls, given: str | None, count: int, force: bool = False) -> Target:
        """Read --output for `count` files. Raises UsageError or EnvironmentFault on what could not be written."""
        given = "outputs" if given is None else given
        path = Path(given)
        _check_name(path, given)
        single = path.suffix.lower() == ".png" and not path.is_dir()
        if path.suffix and not single and not path.is_dir():
            raise UsageError(f"--output {given!r}: only .png files are written; give a .png name or a folder")
        if single and count > 1:
            raise UsageError(f"--output {given!r} is one file, but {count} are made; give a folder")
        if single and path.exists() and not force:
            raise UsageError(f"--output {given!r} exists; --force overwrites it")
        _check_folder(path.parent if single else path, given)
        return cls(path, single, force)

    def write(self, data: bytes, stem: str) -> Path:
        """Write one PNG. In a folder a name that is taken gets a number, unless `force`."""
        if self.single:
            return files.write(self.path, data, replace=self.force)
        for k in range(1, 10_000):
            try:
                return files.write(self.path / f"{stem}{'' if k == 1 else f'-{k}'}.png", data, replace=self.force)
            except UsageError:
                continue
        raise UsageError(f"{stem}.png and 9,998 numbered names are taken in {str(self.path)!r}; choose another --output")


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower case letters, digits and hyphens, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"


def _check_name(path: Path, given: str) -> None:
    if "\0" in given or any(len(os.fsencode(part)) > LONGEST for part in path.parts):
        raise UsageError(f"--output {given[:60]!r}: a name has at most {LONGEST} bytes and no NUL")


def _check_folder(folder: Path, given: str) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise EnvironmentFault(f"--output {given!r} cannot be reached: {error.strerror}") from error
    if not folder.is_dir():
        raise UsageError(f"--output {given!r}: {str(folder)!r} is a file; give a .png name or a folder")
    if not os.access(folder, os.W_OK):
        raise EnvironmentFault(f"--output {given!r}: the folder {str(folder)!r} cannot be written to")
