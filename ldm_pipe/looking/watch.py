"""Everybody who looks at a run while it goes: the progress bar, the recorder, the previews."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ldm_pipe.looking.flags import Looking

if TYPE_CHECKING:
    from ldm_pipe.looking.record import Recorder
    from ldm_pipe.pipeline import Pipeline
    from ldm_pipe.plan import Plan
    from ldm_pipe.walk import Step


@dataclass(frozen=True, eq=False)
class Watch:
    """plan: the one to run. told: who is told of every step. recorder: what is written at the end."""

    plan: Plan
    told: tuple[Callable[[Step], None], ...] = ()
    recorder: Recorder | None = None
    looking: Looking = field(default_factory=Looking)

    @classmethod
    def of(cls, looking: Looking, pipe: Pipeline, plan: Plan, bar: bool) -> Watch:
        """bar: draw one on standard error (where a preview is not drawn there)."""
        told: list[Callable[[Step], None]] = []
        recorder = None
        if looking.record is not None:
            from ldm_pipe.looking.record import Recorder

            recorder = Recorder(plan)
            told.append(recorder.note)
        if looking.preview is not None:
            from ldm_pipe.looking import preview

            linear: preview.Look
            if looking.decoder is None:
                linear = preview.fit(pipe.bundle.codec, pipe.device)
            else:
                linear = preview.through(looking.decoder, pipe.bundle.codec, pipe.device, looking.preview == "terminal")
            if looking.preview == "terminal":
                told.append(preview.to_terminal(_say, linear, shutil.get_terminal_size().columns))
            else:
                told.append(preview.to_file(looking.preview, linear))
        if bar and looking.preview != "terminal":
            told.append(progress(plan))
        return cls(plan if recorder is None else recorder.watched, tuple(told), recorder, looking)

    def on_step(self, step: Step) -> None:
        """A step is done."""
        for tell in self.told:
            tell(step)

    def finish(self) -> list[str]:
        """Write what is written at the end; the names of the files."""
        if self.recorder is None or self.looking.record is None:
            return []
        return [str(self.recorder.write(self.looking.record, self.looking.force))]


def progress(whole: Plan) -> Callable[[Step], None]:
    """A bar on the terminal over all steps of all batches."""
    batches = -(-len(whole.rows) // whole.given.batch_size)
    total, done = batches * (len(whole.levels) - 1), 0

    def show(step: Step) -> None:
        nonlocal done
        done += 1
        filled = min(30, 30 * done // total)
        _say(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total}" + "\n" * (done == total))

    return show


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
