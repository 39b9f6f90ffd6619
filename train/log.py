"""What a person sees of a run: a line on the terminal and one in `log.jsonl`, every so many steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm_pipe import files
from train.job import Job


class Log:
    """Means of the losses over `log_every` steps. `rows` holds those of the steps since the last line; checkpoints keep it,
    so that a resumed run writes the same lines. world: processes that make samples. track: told each line too."""

    def __init__(self, output: Path, job: Job, world: int = 1, say: Callable[[str], None] = print) -> None:
        self.path, self.job, self.world, self.say = output / "log.jsonl", job, world, say
        self.track: Callable[[int, Mapping[str, Any]], None] = lambda step, record: None
        self.rows: list[dict[str, float]] = []
        self.since, self.steps = time.perf_counter(), 0

    def resume(self, step: int, rows: list[dict[str, float]]) -> None:
        """Go on after `step`: lines of later steps, which will be trained again, are taken out."""
        self.rows = list(rows)
        if self.path.exists():
            lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            files.write(self.path, "".join(line + "\n" for line in lines).encode(), replace=True)

    def step(self, step: int, losses: Mapping[str, float]) -> None:
        """Take note of the losses of one step (counted from 0)."""
        self.rows.append(dict(losses))
        self.steps += 1
        if (step + 1) % self.job.log_every:
            return
        means = {name: round(self._mean(name), 6) for name in self.rows[-1]}
        seconds = time.perf_counter() - self.since
        speed = self.steps * self.job.batch * self.world / seconds
        left = (self.job.last - step - 1) * seconds / self.steps
        shown = "  ".join(f"{k} {v:.5g}" for k, v in means.items())
        self.write({"step": step + 1, **means, "lr": self.job.rate(step), "samples_per_second": round(speed, 1)})
        self.say(f"step {step + 1}/{self.job.steps}  {shown}  {speed:.0f}/s  {_clock(left)} left")
        self.rows, self.since, self.steps = [], time.perf_counter(), 0

    def write(self, record: Mapping[str, Any]) -> None:
        """One line of `log.jsonl`; numbers that are not finite are left out, as JSON has none."""
        kept = {k: v for k, v in record.items() if not isinstance(v, float) or math.isfinite(v)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")
        self.track(int(record["step"]), kept)

    def _mean(self, name: str) -> float:
        values = [r[name] for r in self.rows if math.isfinite(r.get(name, math.nan))]
        return math.fsum(values) / len(values) if values else math.nan


def _step_of(line: str) -> float:
    """The step of a line; a line that a kill cut off counts as later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _clock(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
