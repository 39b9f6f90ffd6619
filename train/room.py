"""Where memory runs out in a step: what would fit, found by trying smaller parts of the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldm_pipe import memory
from ldm_pipe.errors import EnvironmentFault
from train.job import Job

LESS = 'task.gradient_checkpointing = true (where the task has it), job.precision = "bf16" or a smaller data.side need less'


def ran_out(job: Job, step: int, backward: Callable[[int], Any] | None) -> EnvironmentFault:
    """The error of a step in one sentence. backward: tries the gradients of its batch in so many parts; None: no trying."""
    head = f"memory ran out in step {step + 1}, {job.batch // job.accumulate} sample(s) at a time"
    kept = "the last checkpoint is kept, --allow-changed goes on from it"
    more = [n for n in range(job.accumulate + 1, job.batch + 1) if job.batch % n == 0]
    if more and backward is None:
        return EnvironmentFault(f"{head}; try job.accumulate = {more[0]}, the same steps in smaller parts; {kept}")
    for parts in more:
        with memory.forgiven():
            backward(parts)  # type: ignore[misc]
            return EnvironmentFault(f"{head}; job.accumulate = {parts} fits, the same steps in smaller parts; {kept}")
    return EnvironmentFault(f"{head}{', and of one sample too' if more else ''}; {LESS}; {kept}")
