"""The one training loop. A task says what is trained and what a batch is; everything else is here.

Nothing random is saved: the ids of a step are a pure function of the step, and a task draws pictures, noise, levels and
dropout from (seed, id) alone. So stopping at any step and resuming continues the same run.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldm_pipe import memory
from ldm_pipe.errors import EnvironmentFault, NumericalError, UsageError
from train import checkpoint, optimisers, report, scale, trackers
from train.batches import batches, parts_of, worker_fault
from train.facts import defaults, facts
from train.job import Batch, Job, Task
from train.log import Log
from train.post_hoc import PowerAverage
from train.room import ran_out
from train.safety import Signals, Stopped, not_finite, only_run

MOST_FAULTS = 3  # steps in a row that may be skipped


class Outcome(NamedTuple):
    """Of one step, the same on every process: losses, what was not finite ("" where all was), and a signal or 0."""

    losses: dict[str, float]
    fault: str
    signal: int


def run(task: Task, job: Job, allow_changed: bool = False) -> Path:
    """Train `task` by `job`, resuming from the newest valid checkpoint. Returns the folder of the exported model.

    Raises UsageError where a run is to go on with another configuration, NumericalError after three steps in a row that were
    not finite, Stopped after a signal (the state is saved then).
    """
    trackers.check(job)
    accelerator = scale.accelerator(job)
    output = Path(job.output)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_run(output))
            checkpoint.tidy(output)
        signals = stack.enter_context(Signals().heard())
        loop = _begin(task.grouped(job.batch * accelerator.num_processes), job, accelerator, signals, allow_changed)
        stack.callback(loop.trackers.close)
        try:
            loop.train()
        except RuntimeError as error:
            if not job.workers or "DataLoader worker" not in str(error):
                raise
            fault = worker_fault(error)
        else:
            return loop.finish()
        raise fault  # here, where no traceback keeps the loader


@dataclass
class _Loop:
    """A run that has begun."""

    task: Task
    job: Job
    accelerator: Accelerator
    signals: Signals
    net: Any
    prepared: nn.Module
    optimiser: torch.optim.Optimizer
    keeper: checkpoint.Keeper
    log: Log
    trackers: trackers.Trackers
    step: int
    faults: int = 0

    def train(self) -> None:
        """All steps that are left."""
        world = self.accelerator.num_processes
        for batch in batches(self.task, self.job, self.step, self.accelerator.process_index, world):
            outcome = self._one(batch)
            self.step += 1
            due = self.step % self.job.save_every == 0 or self.step == self.job.last or outcome.signal
            if due:
                self._save()
            if outcome.signal:
                raise Stopped(f"stopped and saved after step {self.step}; the same command goes on", outcome.signal)
            if self.job.validate_every and self.step % self.job.validate_every == 0:
                self._validate()

    def _one(self, batch: Batch) -> Outcome:
        for group in self.optimiser.param_groups:
            group["lr"] = self.job.rate(self.step)
        try:
            losses, fault = self._backward(batch, self.job.accumulate)
        except (MemoryError, RuntimeError) as error:
            if not memory.exhausted(error):
                raise
            raise self._ran_out(batch, error) from None
        norm = scale.whole(self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.job.clip))
        scaler = self.accelerator.scaler
        if not fault and not torch.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            bad = [n for n, p in self.net.named_parameters() if p.grad is not None and not scale.whole(p.grad).isfinite().all()]
            fault = f"the gradient of {bad[0] if bad else 'all weights'} in {', '.join(batch['names'])}"
        outcome = self._agreed(losses, fault)
        skipped = bool(outcome.fault)
        if scaler is not None:  # it skips a step by itself, and learns from it: its scale falls
            before = scaler.get_scale()
            self.optimiser.step()
            skipped = skipped or scaler.get_scale() < before
        elif not skipped:
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if outcome.fault:
            self._count(outcome.fault)
        else:
            self.faults = 0
        if not skipped:
            self.keeper.ema.update(self.net, self.step)
            for average in self.keeper.averages:
                average.update(self.net, self.step)
        if self.accelerator.is_main_process:
            self.log.step(self.step, outcome.losses)
        return outcome

    def _ran_out(self, batch: Batch, error: BaseException) -> EnvironmentFault:
        error.__traceback__ = None  # its frames hold what did not fit
        self.optimiser.zero_grad(set_to_none=True)
        alone = self.accelerator.num_processes == 1  # others would wait for this one
        return ran_out(self.job, self.step, (lambda parts: self._backward(batch, parts)) if alone else None)

    def _backward(self, batch: Batch, accumulate: int) -> tuple[dict[str, Tensor], str]:
        """The gradients of a batch: its losses averaged over the parts, and the first fault."""
        parts = parts_of(batch, accumulate)
        rows: list[dict[str, Tensor]] = []
        fault = ""
        for i, part in enumerate(parts):
            moved = {k: v.to(self.accelerator.device) for k, v in part.items() if isinstance(v, Tensor)}
            last = i + 1 == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.prepared):
                out = self.prepared(moved)
                fault = fault or not_finite({**moved, "names": part["names"]}, out)
                self.accelerator.backward(out["loss"] / len(parts))
            rows.append({n: v.detach().double() for n, v in out.items() if v.ndim == 0})
        return {n: torch.stack([r[n] for r in rows]).nanmean() for n in rows[0]}, fault

    def _agreed(self, losses: dict[str, Tensor], fault: str) -> Outcome:
        """The same outcome on every process."""
        world = self.accelerator.num_processes
        if world == 1:
            return Outcome({n: float(v) for n, v in losses.items()}, fault, self.signals.asked)
        own = [*losses.values(), torch.tensor(float(bool(fault))), torch.tensor(float(self.signals.asked))]
        all_ = self.accelerator.gather(torch.stack([v.to(self.accelerator.device).float() for v in own])[None])
        means = all_[:, :-2].double().nanmean(0).tolist()
        elsewhere = "what another process was given" if all_[:, -2].any() else ""
        return Outcome(dict(zip(losses, means, strict=True)), fault or elsewhere, int(all_[:, -1].max()))

    def _count(self, fault: str) -> None:
        self.faults += 1
        print(f"step {self.step + 1} is skipped: {fault} is not finite", flush=True)
        if self.faults == MOST_FAULTS:
            words = f"{MOST_FAULTS} steps in a row were not finite, step {self.step + 1} last: {fault}"
            raise NumericalError(f"{words}; the last checkpoint is kept")

    def _save(self) -> None:
        if not (self.accelerator.is_main_process or scale.sharded(self.accelerator)):
            return
        state: dict[str, Any] = {"rows": self.log.rows, "faults": self.faults}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        self.keeper.save(self.step, state, self.accelerator.is_main_process)

    def _validate(self) -> None:
        with scale.averaged(self.accelerator, self.task, self.net, self.keeper.ema) as (task, net), torch.no_grad():
            if self.accelerator.is_main_process:
                folder = Path(self.job.output) / "validation" / f"{self.step:06d}"
                net.eval()
                found = task.validate(net, folder)
                net.train()
                if found:
                    self.log.write({"step": self.step, "validation": found})
                    self.log.say(f"step {self.step}  " + "  ".join(f"{k} {v:.5g}" for k, v in found.items()))
                self.trackers.pictures(self.step, folder)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Export the averaged weights."""
        output, folder = Path(self.job.output), Path(self.job.output) / "export"
        with scale.averaged(self.accelerator, self.task, self.net, self.keeper.ema) as (task, net):
            if self.accelerator.is_main_process:

                def write(temp: Path) -> None:
                    task.export(net, temp)
                    report.card(temp, output.name, self.keeper.facts, self.step)

                checkpoint.export(folder, write)
                report.write(output, self.keeper.facts)
        self.accelerator.wait_for_everyone()
        return folder


def _begin(task: Task, job: Job, accelerator: Accelerator, signals: Signals, allow_changed: bool) -> _Loop:
    """The run as it stands before its next step."""
    output = Path(job.output)
    torch.manual_seed(job.seed)  # initial weights only
    with accelerator.main_process_first():  # what the first makes (caches), the others read
        net = task.net()
    trained = [p for p in net.parameters() if p.requires_grad]
    wrong = [n for n, p in net.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if wrong or not trained:
        raise UsageError(f"trained weights are kept in fp32, and {wrong[0]} is not" if wrong else "nothing is trained")
    if job.channels_last:
        net = net.to(memory_format=torch.channels_last)
    optimiser = optimisers.make(job, trained)
    told, averages = facts(task, job, accelerator.num_processes), [PowerAverage(net, width) for width in job.post_hoc]
    average = optimisers.average(job, net, optimiser)
    keeper = checkpoint.Keeper(output, net, average, optimiser, told, job.keep, averages, defaults(task))
    found = keeper.restore(accelerator.print, allow_changed)
    if accelerator.is_main_process:
        keeper.put_broken_aside()
        checkpoint.check_space(output, net, job.keep)
    accelerator.wait_for_everyone()
    log = Log(output, job, accelerator.num_processes, lambda text: accelerator.print(text, flush=True))
    if accelerator.is_main_process:
        log.resume(found.step, found.state.get("rows", []))
    beside = trackers.begin(job, accelerator, found.step, told)
    log.track = beside.log
    prepared, wrapped = accelerator.prepare(net, optimiser)
    keeper.settle(found)
    prepared = scale.compiled(prepared, job.compile)
    if accelerator.scaler is not None and "scaler" in found.state:
        accelerator.scaler.load_state_dict(found.state["scaler"])
    loop = _Loop(task, job, accelerator, signals, net, prepared, wrapped, keeper, log, beside, found.step)
    loop.faults = int(found.state.get("faults", 0))
    return loop
