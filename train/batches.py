"""The batches of a run, made here or by worker processes; either way the same ones in the same order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm_pipe.errors import EnvironmentFault, LdmError
from train.job import Batch, Job, Task, ids_of


class _Failure(NamedTuple):
    """What went wrong in a worker: an exception would come back as a page of traceback."""

    words: str
    exit_code: int


class _Steps(Dataset[Batch | _Failure]):
    def __init__(self, task: Task, job: Job, rank: int, world: int) -> None:
        self.task, self.job, self.rank, self.world = task, job, rank, world

    def __getitem__(self, step: int) -> Batch | _Failure:
        ids = ids_of(step, self.job.batch, self.rank, self.world)
        try:
            batch = self.task.batch(self.job.seed, ids)
            return batch if "names" in batch else {**batch, "names": [f"sample {i}" for i in ids]}
        except LdmError as error:
            return _Failure(str(error), error.exit_code)
        except Exception as error:
            return _Failure(f"the batch of step {step} cannot be made: {type(error).__name__}: {error}", 1)


def batches(task: Task, job: Job, first: int, rank: int, world: int) -> Iterator[Batch]:
    """The batches of steps first..job.last - 1 on one process. Raises LdmError, one line, where one cannot be made."""
    steps = _Steps(task, job, rank, world)
    order = range(first, job.last)
    fault: LdmError
    made: Iterator[Batch | _Failure] = map(steps.__getitem__, order)
    if job.workers:
        settings = {"batch_size": None, "num_workers": job.workers, "timeout": job.patience, "multiprocessing_context": "fork"}
        made = iter(DataLoader(steps, sampler=order, worker_init_fn=_ignore_interrupts, **settings))  # type: ignore[arg-type]
    while True:
        try:
            batch = next(made)
        except StopIteration:
            return
        except (RuntimeError, OSError) as error:  # a worker was killed, or took longer than `patience`
            fault = worker_fault(_cause(error))
            break  # to raise outside: a traceback would keep the loader, and torch's handler of signals would raise once more
        if isinstance(batch, _Failure):
            fault = LdmError(batch.words)
            fault.exit_code = batch.exit_code
            break
        yield batch
    del made
    raise fault


def worker_fault(error: Exception) -> EnvironmentFault:
    """One line for a worker that was killed or hangs. Torch raises that from a signal handler: anywhere in the loop."""
    return EnvironmentFault(f"a worker that makes batches failed: {(str(error) or type(error).__name__).splitlines()[0]}")


def _cause(error: Exception) -> Exception:
    """A broken connection to a worker is the first to be seen; the signal that says of what it died follows."""
    if isinstance(error, OSError):
        try:
            time.sleep(1)
        except RuntimeError as told:
            return told
    return error


def parts_of(batch: Batch, count: int) -> list[Batch]:
    """A batch in `count` equal parts, every tensor and list cut along its first axis."""
    size = next(len(v) for v in batch.values() if isinstance(v, Tensor)) // count
    cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
    return [{k: v[c] if isinstance(v, Tensor | list) else v for k, v in batch.items()} for c in cuts]


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole group of processes; how to end is the main one's to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
