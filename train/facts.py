"""What must not change while a run goes on, as flat names and values: "job.lr", "task.data.path" and so on."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from train.job import Job, Task

# What may differ when a run goes on: it changes no weight, or (compile) none by more than rounding.
FREE = frozenset({
    "output", "stop", "save_every", "log_every", "validate_every", "keep", "workers", "patience", "trackers", "compile",
})  # fmt: skip


def facts(task: Task, job: Job, processes: int) -> dict[str, Any]:
    """Of a task, its data and its job. The batch is that of all processes: one process of 8 is two of 4."""
    own: dict[str, Any] = asdict(task) if is_dataclass(task) and not isinstance(task, type) else {}
    told = {f"job.{k}": v for k, v in asdict(job).items() if k not in FREE}
    return {"task": type(task).__name__, **_flat("task", own), **told, "job.batch": job.batch * processes, **task.facts()}


def defaults(task: Task) -> dict[str, Any]:
    """What a field that a checkpoint does not have (it is of an older version) stands for there."""
    found: dict[str, Any] = {}
    for prefix, of in (("task", task), ("job", Job)):
        for field in fields(of) if is_dataclass(of) else ():  # type: ignore[arg-type]
            if field.default is not MISSING:
                found[f"{prefix}.{field.name}"] = field.default
    return found


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(f"{prefix}.{name}", part).items()}
    return {prefix: value}
