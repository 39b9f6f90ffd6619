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

import torch
from torch import Tensor

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


def not_finite(batch: dict[str, Any], out: dict[str, Tensor]) -> str:
    """What is not finite in a batch or its losses, with the samples and their levels; "" where all is finite."""
    if torch.isfinite(out["loss"]):
        return ""
    names = batch["names"]
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            rows = [i for i in range(len(value)) if not torch.isfinite(value[i]).all()]
            return f"{key} of {', '.join(names[i] for i in rows)}"
    if "each" not in out:
        return f"the loss of the samples {', '.join(names)}"
    rows = [i for i, v in enumerate(torch.isfinite(out["each"]).tolist()) if not v]
    levels = [f" at u = {float(out['u'][i]):.3f}" if "u" in out else "" for i in rows]
    which = ", ".join(f"{names[i]}{where}" for i, where in zip(rows, levels, strict=True))
    return f"the loss of {which}" if rows else "the loss as a whole"
