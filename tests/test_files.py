"""The only writer: whole or not at all, in the order that survives a crash, with the user's umask."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldm_pipe import EnvironmentFault, UsageError, files


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and moved, in order: "fsync NAME", "link NAME", "replace NAME"."""
    found: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def flush(handle: int) -> None:
        found.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def hard(source: Any, target: Any) -> None:
        found.append(f"link {Path(target).name}")
        link(source, target)

    def move(source: Any, target: Any) -> None:
        found.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "link", hard)
    monkeypatch.setattr(os, "replace", move)
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_writes_into_new_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "c.bin"
    assert files.write(target, b"abc") == target
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == ["c.bin"]


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    target = files.write(tmp_path / "a", b"old")
    with pytest.raises(UsageError, match="exists and is not overwritten"):
        files.write(target, b"new")
    assert (target.read_bytes(), names(tmp_path)) == (b"old", ["a"])
    files.write(target, b"new", replace=True)
    assert (target.read_bytes(), names(tmp_path)) == (b"new", ["a"])


def test_a_file_made_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the name after the content is flushed: link(2) refuses, nothing is lost."""
    target, fsync = tmp_path / "a", os.fsync

    def flush(handle: int) -> None:
        fsync(handle)
        if not target.exists():
            target.write_bytes(b"theirs")

    monkeypatch.setattr(os, "fsync", flush)
    with pytest.raises(UsageError):
        files.write(target, b"ours")
    assert (target.read_bytes(), names(tmp_path)) == (b"theirs", ["a"])


@pytest.mark.parametrize("replace", [False, True])
def test_content_is_flushed_before_its_name_and_the_folder_after(tmp_path: Path, calls: list[str], replace: bool) -> None:
    files.write(tmp_path / "a", b"abc", replace=replace)
    assert calls[0].startswith("fsync .ldm-")
    assert calls[1:] == [f"{'replace' if replace else 'link'} a", f"fsync {tmp_path.name}"]


@pytest.mark.usefixtures("umask")
def test_the_umask_is_honoured(tmp_path: Path) -> None:
    assert mode(files.write(tmp_path / "a", b"")) == 0o640
    assert os.umask(0o027) == 0o027  # and left as it was
    with files.new_folder(tmp_path / "folder") as temp:
        (temp / "sub").mkdir(mode=0o700)
        (temp / "sub" / "file").write_bytes(b"")
        (temp / "sub" / "file").chmod(0o600)
    found = [mode(tmp_path / "folder" / p) for p in ("", "sub", "sub/file")]
    assert found == [0o750, 0o750, 0o640]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace: bool, number: int) -> None:
    target = tmp_path / "a"
    if replace:
        target.write_bytes(b"old")

    def fails(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(EnvironmentFault, match=f"cannot write .*{os.strerror(number)}"):
        files.write(target, b"new", replace=replace)
    monkeypatch.undo()
    assert names(tmp_path) == (["a"] if replace else [])
    assert not replace or target.read_bytes() == b"old"


def test_a_file_size_limit_leaves_the_old_bytes(tmp_path: Path) -> None:
    target = files.write(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    try:
        with pytest.raises(EnvironmentFault, match="File too large"):
            files.write(target, bytes(100_000), replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (target.read_bytes(), names(tmp_path)) == (b"old", ["a"])


def test_a_file_in_place_of_a_folder_is_the_machines_fault(tmp_path: Path) -> None:
    files.write(tmp_path / "a", b"old")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        files.write(tmp_path / "a" / "b", b"new")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        files.write(tmp_path / ("x" * 300), b"new")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_without_hard_links_an_existing_file_is_still_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(source: Any, target: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fails)
    target = files.write(tmp_path / "a", b"old")
    with pytest.raises(UsageError):
        files.write(target, b"new")
    assert (target.read_bytes(), names(tmp_path)) == (b"old", ["a"])


def test_a_folder_appears_whole(tmp_path: Path, calls: list[str]) -> None:
    target = tmp_path / "folder"
    with files.new_folder(target) as temp:
        (temp / "a").write_bytes(b"a")
        (temp / "sub").mkdir()
        (temp / "sub" / "b").write_bytes(b"b")
        assert not target.exists()
        assert temp.parent == tmp_path
    assert (target / "sub" / "b").read_bytes() == b"b"
    assert names(tmp_path) == ["folder"]
    moved = calls.index("replace folder")
    flushed = sorted(calls[:moved])
    assert flushed[0].startswith("fsync .ldm-")  # the new folder itself, or its names may be lost
    assert flushed[1:] == ["fsync a", "fsync b", "fsync sub"]
    assert calls[moved + 1 :] == [f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_folder_that_fails_does_not_appear(tmp_path: Path, replace: bool, error: type[BaseException]) -> None:
    target = tmp_path / "folder"
    if replace:
        files.write(target / "a", b"old")

    def fill() -> None:
        with files.new_folder(target, replace=replace) as temp:
            (temp / "a").write_bytes(b"new")
            raise error("stop")

    with pytest.raises(EnvironmentFault if error is OSError else error):
        fill()
    assert names(tmp_path) == (["folder"] if replace else [])
    assert not replace or (target / "a").read_bytes() == b"old"


def test_an_existing_folder_is_kept_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    files.write(target / "a", b"old")
    with pytest.raises(UsageError, match="exists"), files.new_folder(target):
        raise AssertionError("not reached")
    with files.new_folder(target, replace=True) as temp:
        (temp / "b").write_bytes(b"new")
        assert (target / "a").read_bytes() == b"old"
    assert (names(target), names(tmp_path)) == (["b"], ["folder"])


def test_a_folder_made_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def fill() -> None:
        with files.new_folder(target) as temp:
            (temp / "a").write_bytes(b"ours")
            files.write(target / "a", b"theirs")

    with pytest.raises(UsageError, match="exists"):
        fill()
    assert ((target / "a").read_bytes(), names(tmp_path)) == (b"theirs", ["folder"])


def test_the_old_folder_comes_back_when_the_new_one_cannot_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, move = tmp_path / "folder", os.replace
    files.write(target / "a", b"old")
    failed = []

    def fails_once(source: Any, place: Any) -> None:
        if Path(place) == target and not failed:
            failed.append(place)
            raise OSError(errno.EIO, "no")
        move(source, place)

    monkeypatch.setattr(os, "replace", fails_once)

    def fill() -> None:
        with files.new_folder(target, replace=True) as temp:
            (temp / "a").write_bytes(b"new")

    with pytest.raises(EnvironmentFault):
        fill()
    assert ((target / "a").read_bytes(), names(tmp_path)) == (b"old", ["folder"])


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    assert files.sha256(files.write(tmp_path / "a", data)) == hashlib.sha256(data).hexdigest()
