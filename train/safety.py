"""One run per folder, and an end in good order: the lock and the signals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from ldm_pipe.errors import EnvironmentFault, LdmError


class Stopped(LdmError):
    """A signal ended the run after a checkpoint; `exit_code` is 128 plus the signal's number, as shells have it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextlib.contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Hold the folder for one run. Raises EnvironmentFault naming the process that has it.

    The kernel lets go of the lock when its process ends, however it ends, so no stale one can be left.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        handle = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise EnvironmentFault(f"cannot write {str(output)!r}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise EnvironmentFault(f"{str(output)!r} is in use by {holder}; give job.output another folder") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


class Signals:
    """The first SIGINT or SIGTERM asks the loop to save and end, a second SIGINT ends at once (KeyboardInterrupt).

    `asked` is the signal's number, 0 where there was none. A launcher may send SIGTERM behind the terminal's SIGINT: that
    counts once.
    """

    def __init__(self) -> None:
        self.asked = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number

    @contextlib.contextmanager
    def heard(self) -> Iterator[Signals]:
        """Listen while a `with` runs; the handlers from before come back."""
        if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
            yield self
            return
        before: dict[signal.Signals, Any] = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
