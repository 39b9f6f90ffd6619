"""The only writer of files: temp file, fsync, rename, fsync of the folder. A reader never sees half a file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ldm_pipe.errors import EnvironmentFault, UsageError


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fault(error: OSError, path: Path) -> EnvironmentFault:
    return EnvironmentFault(f"cannot write {str(path)!r}: {error.strerror or error}")


def write(path: str | os.PathLike[str], data: bytes, *, replace: bool = False) -> Path:
    """Write `data` to `path` whole or not at all.

    Without `replace` an existing file is kept and UsageError raised, also when another process makes it meanwhile
    (the name is taken by link(2), which never overwrites). Raises EnvironmentFault when the machine refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".ldm-")  # its own name may be short where path's is not
    except OSError as error:
        raise _fault(error, path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        _place(Path(name), path, replace)
        _sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise UsageError(f"{str(path)!r} exists and is not overwritten; choose another name") from error
        raise _fault(error, path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return path


def _place(temp: Path, path: Path, replace: bool) -> None:
    if replace:
        os.replace(temp, path)
        return
    try:
        os.link(temp, path)
    except OSError as error:  # a file system without hard links: the check is then not atomic, the content still is
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV):
            raise
        if path.exists():
            raise FileExistsError(path) from error
        os.replace(temp, path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder that appears at `path` whole or not at all: yields the temporary folder to write into.

    With `replace` an older folder is put aside first and removed only after the new one stands.
    """
    path = Path(path)
    _keep(path, replace)
    temp = aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = Path(tempfile.mkdtemp(dir=path.parent, prefix=".ldm-"))
        yield temp
        for file in temp.rglob("*"):
            _settle(file)
        _settle(temp)
        _keep(path, replace)
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=".ldm-old-"))
            os.replace(path, aside / path.name)
        os.replace(temp, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _fault(error, path) from error
    finally:
        if aside is not None and not path.exists():  # the new folder could not take its place
            os.replace(aside / path.name, path)
        for left in (temp, aside):
            if left is not None:
                shutil.rmtree(left, ignore_errors=True)


def _keep(path: Path, replace: bool) -> None:
    if path.exists() and not replace:
        raise UsageError(f"{str(path)!r} exists and is not overwritten; choose another name")


def _settle(file: Path) -> None:
    """Flush one finished file to disk and give it the mode that the user's umask asks for (libraries use 0600)."""
    os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~_umask())
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
