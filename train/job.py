"""What a recipe's [job] table says: how long, how fast and where; and what a task is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from ldm_pipe.errors import UsageError
from train.data.source import Fault

Batch = dict[str, Any]


class Task(Protocol):
    """What a job trains. Frozen dataclasses inherit from it; their fields are the recipe's tables.

    TABLES: the classes of further tables whose every key can be checked by itself.
    """

    TABLES: ClassVar[Mapping[str, type]] = {}

    def net(self) -> Any:
        """The trainable module, parameters in fp32. `net(batch)` returns named losses, each a scalar: "loss" is the one that
        is minimised. It may add "each" and "u", [B]: the samples' own losses and levels, by which a fault is named."""

    def batch(self, seed: int, ids: Sequence[int]) -> Batch:
        """The batch of these sample ids, a pure function of (seed, ids). Tensors on the CPU, the batch first; a list "names"
        says in errors which samples they are."""

    def export(self, net: Any, folder: Path) -> None:
        """Write what the job produced (diffusers folder layout) into an empty folder."""

    def grouped(self, size: int) -> Task:
        """The same task, told how many consecutive ids make one step (they may have to be of one shape)."""
        return self

    def facts(self) -> dict[str, str]:
        """What beside the recipe a resumed run must find unchanged, such as the digest of the data."""
        return {}

    def check(self, job: Job) -> list[Fault]:
        """Every fault that can be found before a model is loaded."""
        return []

    def validate(self, net: Any, folder: Path) -> dict[str, float]:
        """Measure the averaged weights: named numbers; pictures go into `folder`. Called every `validate_every` steps."""
        return {}


@dataclass(frozen=True)
class Job:
    """How long, how fast and where.

    batch: samples of one step on one process, computed in `accumulate` parts. optimiser: see train/optimisers.py. lr: after
    `warmup` steps, falling by half a cosine to `lr_end` (schedulefree: it stays). betas, weight_decay: of the optimiser. clip:
    largest norm of a gradient. ema: decay of the weights' average (schedulefree: its own average in place of that).
    post_hoc: widths of averages of which every checkpoint leaves a snapshot, so that `python -m train average` makes one of
    any width afterwards (EDM2: 0.05, 0.1). precision: of the computation; weights and averages stay in fp32. compile: the
    backend of torch.compile. workers: processes that make batches; patience: seconds that they may take. trackers: beside
    log.jsonl. stop: end early without changing the decay (0: never). keep: checkpoints that stay.
    """

    output: str
    steps: int
    batch: int = 64
    accumulate: int = 1
    seed: int = 0
    optimiser: Literal["adamw", "adamw8bit", "schedulefree", "adafactor", "prodigy"] = "adamw"
    lr: float = 1e-3
    lr_end: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    post_hoc: tuple[float, ...] = ()
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: Literal["no", "inductor", "aot_eager", "eager"] = "no"
    channels_last: bool = False
    workers: int = 0
    patience: int = 60
    save_every: int = 500
    log_every: int = 20
    validate_every: int = 0
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    keep: int = 2
    stop: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every", "keep", "patience"):
            if getattr(self, name) < 1:
                raise UsageError(f"job.{name} is {getattr(self, name)}; it takes 1 or more")
        for name in ("warmup", "workers", "stop", "validate_every", "seed", "lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise UsageError(f"job.{name} is {getattr(self, name)}; it takes 0 or more")
        if self.batch % self.accumulate:
            raise UsageError(f"job.batch is {self.batch}; it takes a multiple of job.accumulate, {self.accumulate}")
        if not 0 <= self.ema < 1 or self.clip <= 0:
            raise UsageError("job.ema takes 0 to below 1, job.clip a number above 0")
        if self.post_hoc and self.optimiser == "schedulefree":
            raise UsageError("job.post_hoc averages what schedulefree averages already; leave one of them out")

    @property
    def last(self) -> int:
        """The step before which this run ends."""
        return min(self.steps, self.stop) if self.stop else self.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine from `lr` to `lr_end` (schedulefree: `lr`)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.optimiser == "schedulefree":
            return self.lr
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr_end + (self.lr - self.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def ids_of(step: int, batch: int, rank: int, world: int) -> range:
    """Sample ids of one step on one process: consecutive numbers, no two processes or steps share one."""
    first = (step * world + rank) * batch
    return range(first, first + batch)
