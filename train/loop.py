"""The one training loop. A task says what is trained and what a batch is; everything else is here.

Nothing random is saved: the ids of a step are a pure function of the step, and a task draws pictures, noise, levels and
dropout from (seed, id) alone. So stopping at any step and resuming continues the same run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm_pipe.errors import NumericalError
from train import checkpoint
from train.ema import Ema

Batch = dict[str, Any]


class Task(Protocol):
    """What a job trains. Frozen dataclasses implement it; their fields are the recipe's [task] table."""

    def net(self) -> Any:
        """The trainable module; `net(batch)` returns named losses, each a scalar; "loss" is the one that is minimised."""

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """The batch of these sample ids, a pure function of (seed, ids). Tensors on the CPU."""

    def export(self, net: Any, folder: Path) -> None:
        """Write what the job produced (diffusers folder layout) into an empty folder."""


@dataclass(frozen=True)
class Job:
    """How long, how fast and where. `batch` is per process; `stop` ends early without changing the decay."""

    output: str
    steps: int
    batch: int = 64
    seed: int = 0
    lr: float = 1e-3
    lr_end: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "no"
    channels_last: bool = False
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    stop: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine from `lr` to `lr_end`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def ids_of(step: int, batch: int, rank: int, world: int) -> range:
    """Sample ids of one step on one process: consecutive numbers, no two processes or steps share one."""
    first = (step * world + rank) * batch
    return range(first, first + batch)


def run(task: Task, job: Job) -> Path:
    """Train `task` by `job`, resuming from the newest valid checkpoint. Returns the folder of the exported model."""
    accelerator = Accelerator(mixed_precision=job.precision)
    torch.manual_seed(job.seed)  # initial weights only
    with accelerator.main_process_first():  # what the first makes (caches), the others read
        net = task.net()
    if job.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True)
    ema = Ema(net, job.ema)
    output = Path(job.output)
    first = checkpoint.restore(output, net, ema, optimiser, say=accelerator.print)
    prepared, optimiser = accelerator.prepare(net, optimiser)
    last = min(job.steps, job.stop) if job.stop else job.steps
    log = Log(output, job, accelerator)
    for step in range(first, last):
        ids = ids_of(step, job.batch, accelerator.process_index, accelerator.num_processes)
        losses = _step(accelerator, prepared, optimiser, task.batch(job.seed, ids), job, step)
        ema.update(net, step)
        log.step(step, losses)
        if accelerator.is_main_process and ((step + 1) % job.save_every == 0 or step + 1 == last):
            checkpoint.save(output, step + 1, net, ema, optimiser, keep=job.keep)
    folder = output / "export"
    if accelerator.is_main_process:
        with ema.swapped(net):
            checkpoint.export(folder, lambda temp: task.export(net, temp))
    accelerator.wait_for_everyone()
    return folder


def _step(
    accelerator: Accelerator, net: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, job: Job, step: int
) -> dict[str, Tensor]:
    for group in optimiser.param_groups:
        group["lr"] = job.rate(step)
    batch = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    losses: dict[str, Tensor] = net(batch)
    if not torch.isfinite(losses["loss"]):
        raise NumericalError(f"the loss of step {step} is {losses['loss'].item()}; the last checkpoint is kept")
    accelerator.backward(losses["loss"])
    norm = accelerator.clip_grad_norm_(net.parameters(), job.clip)
    if not torch.isfinite(norm):
        raise NumericalError(f"a gradient of step {step} is not finite; the last checkpoint is kept")
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {name: value.detach() for name, value in losses.items()}


class Log:
    """Means of the losses every `log_every` steps: a line on the terminal and one in `log.jsonl`."""

    def __init__(self, output: Path, job: Job, accelerator: Accelerator) -> None:
        self.path, self.job, self.accelerator = output / "log.jsonl", job, accelerator
        self.rows: list[dict[str, Tensor]] = []
        self.since = time.perf_counter()

    def step(self, step: int, losses: dict[str, Tensor]) -> None:
        """Take note of one step's losses."""
        self.rows.append(losses)
        if (step + 1) % self.job.log_every or not self.accelerator.is_main_process:
            return
        record = {name: round(float(value), 6) for name, value in self._means()}
        seconds = time.perf_counter() - self.since
        speed = len(self.rows) * self.job.batch * self.accelerator.num_processes / seconds
        left = (self.job.steps - step - 1) * seconds / len(self.rows)
        line = {"step": step + 1, **record, "lr": self.job.rate(step), "samples_per_second": round(speed, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{k} {v:.5g}" for k, v in record.items())
        where = f"step {step + 1}/{self.job.steps}"
        self.accelerator.print(f"{where}  {shown}  {speed:.0f}/s  {left / 60:.1f} min left", flush=True)
        self.rows, self.since = [], time.perf_counter()

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.rows[0]:
            yield name, torch.stack([row[name].float() for row in self.rows]).mean()
