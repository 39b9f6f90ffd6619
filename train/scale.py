"""More than one process: what `accelerate launch --config_file` chose, and whole tensors where FSDP2 keeps shards.

PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, Zhao et al. 2023, arXiv 2304.11277, in its second form
(`fully_shard`), where a parameter is a DTensor. A checkpoint always holds whole tensors: a run may go on with another number of
processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from ldm_pipe.errors import UsageError
from train.ema import Ema
from train.job import Job

T = TypeVar("T", Tensor, Any)
SHARDED = frozenset({"adamw", "schedulefree"})  # optimisers whose slots have the shapes of their parameters


def accelerator(job: Job) -> Accelerator:
    """Accelerate as its launcher configured it. Raises UsageError, one line, on what this loop or this machine cannot do."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        words = "this loop does not run under DeepSpeed: its optimiser would be in no checkpoint"
        raise UsageError(f"{words}; configs/accelerate/fsdp2.yaml shards weights, gradients and moments (ZeRO-3)")
    try:
        places = ProjectConfiguration(project_dir=job.output, logging_dir=os.path.join(job.output, "tensorboard"))
        found = Accelerator(mixed_precision=job.precision, log_with=list(job.trackers) or None, project_config=places)
    except (ValueError, ImportError) as error:
        what = "Accelerate cannot begin" if job.precision == "no" else f"job.precision {job.precision!r} is not to be had here"
        raise UsageError(f"{what}: {error}") from error
    if sharded(found) and not found.is_fsdp2:
        raise UsageError("this loop shards by FSDP2; set fsdp_version: 2 as in configs/accelerate/fsdp2.yaml")
    if sharded(found) and (job.optimiser not in SHARDED or job.post_hoc):
        raise UsageError(f"under FSDP2 job.optimiser takes {' or '.join(sorted(SHARDED))}, and job.post_hoc stays empty")
    return found


def sharded(found: Accelerator) -> bool:
    """Does every process hold a part of each weight?"""
    return str(found.distributed_type.value) == "FSDP"


def whole(value: T) -> T:
    """A tensor that is on every process as a whole. All processes have to ask for a shard at once."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def whole_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`whole` for every tensor of a state."""
    return {n: whole(t) for n, t in state.items()}


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor where another one is: on its device, and sharded as it is."""
    if not hasattr(model, "full_tensor") or value.shape != model.shape:
        return value.to(model.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)  # type: ignore[attr-defined]


@contextlib.contextmanager
def averaged(found: Accelerator, task: Any, net: Any, ema: Ema) -> Iterator[tuple[Any, Any]]:
    """The task and a network with the averaged weights, for the main process; all processes have to come here.

    Where the weights are sharded that is another network, of a task with nothing loaded yet.
    """
    if not sharded(found):
        with ema.swapped(net):
            yield task, net
        return
    weights, whole_net = whole_dict(ema.shadow), None
    task = dataclasses.replace(task)
    if found.is_main_process:
        whole_net = task.net().to(found.device)
        whole_net.load_state_dict(weights)
    yield task, whole_net


def compiled(net: Any, backend: str) -> Any:
    """Compile a network's forward in place, so that its weights keep their names. Raises UsageError without a compiler."""
    if backend != "no":
        if backend == "inductor" and not _has_compiler(net):
            raise UsageError("job.compile inductor takes a C++ compiler on a CPU; aot_eager and eager take none")
        net.compile(backend=backend)
    return net


def _has_compiler(net: torch.nn.Module) -> bool:
    on_cpu = next(net.parameters()).device.type == "cpu"
    return not on_cpu or any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))
