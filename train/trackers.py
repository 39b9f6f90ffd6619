"""TensorBoard and Weights & Biases beside `log.jsonl`, through Accelerate's trackers. Nothing leaves the machine by itself."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ldm_pipe import files
from ldm_pipe.errors import UsageError
from train.job import Job


@dataclass(frozen=True, eq=False)
class Trackers:
    """The trackers of a run (none where the recipe names none)."""

    accelerator: Accelerator
    active: bool

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """The numbers of one line of the log; those of a validation as "validation/<name>"."""
        if self.active:
            inner = record.get("validation", {})
            flat = {**record, **{f"validation/{k}": v for k, v in inner.items()}}
            self.accelerator.log({k: v for k, v in flat.items() if k != "step" and isinstance(v, int | float)}, step=step)

    def pictures(self, step: int, folder: Path) -> None:
        """The validation pictures of a step."""
        found = sorted(folder.glob("*.png")) if self.active else []
        if found:
            import numpy as np

            from ldm_pipe import image

            stacked = [np.asarray(image.read(f))[None] for f in found]
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                for file, pixels in zip(found, stacked, strict=True):
                    tracker.log_images({f"validation/{file.stem}": pixels}, step=step, **layout)

    def close(self) -> None:
        """Write out what is pending."""
        if self.active:
            self.accelerator.end_training()


def begin(job: Job, accelerator: Accelerator, step: int, facts: Mapping[str, Any]) -> Trackers:
    """Open the trackers of a run that goes on after `step`; what they have of later steps is hidden (TensorBoard).

    Weights & Biases writes to `<output>/wandb` without a network unless WANDB_MODE says otherwise, always under one id, so that
    `wandb sync --append` joins the parts of a run that was stopped.
    """
    if not job.trackers:
        return Trackers(accelerator, False)
    output = Path(job.output)
    settings: dict[str, dict[str, Any]] = {}
    if "tensorboard" in job.trackers:
        settings["tensorboard"] = {"purge_step": step + 1}
    if "wandb" in job.trackers and accelerator.is_main_process:
        kept = {"id": _id(output / ".wandb_id"), "resume": "allow", "dir": str(output), "config": dict(facts)}
        settings["wandb"] = {**kept, "name": output.name, "mode": os.environ.get("WANDB_MODE", "offline")}
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "ldm_pipe"), init_kwargs=settings)
    return Trackers(accelerator, True)


def check(job: Job) -> None:
    """Raise UsageError where a tracker's package is not installed."""
    for name in job.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"job.trackers: {name} needs the package {name}: pip install 'ldm_pipe[trackers]'")


def _id(file: Path) -> str:
    """The run's name at Weights & Biases, made once."""
    if not file.exists():
        files.write(file, uuid.uuid4().hex[:12].encode())
    return file.read_text(encoding="utf-8")
