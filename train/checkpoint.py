"""Checkpoints that survive a kill: temp folder, SHA-256 manifest, rename; tensors in safetensors, the rest in JSON.

<output>/step-000500/  weights.safetensors  ema.safetensors  optimiser.safetensors  manifest.json
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_pipe import files
from ldm_pipe.errors import EnvironmentFault, NumericalError, UsageError
from train import optimisers
from train.ema import Ema
from train.post_hoc import PowerAverage
from train.scale import like, whole_dict

FORMAT = 2
READS = (1, 2)  # 1 had no `facts` and no `state`


@dataclass(frozen=True)
class Found:
    """The checkpoint a run goes on from. step: steps that are done (0: a new run). state: what the loop had put in. optimiser:
    the tensors and numbers of its state (empty: it begins anew)."""

    step: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)
    optimiser: tuple[Mapping[str, Tensor], Mapping[str, Any]] = ({}, {})


@dataclass(frozen=True)
class Keeper:
    """Writes and reads the checkpoints of one run.

    facts: flat names and values that must not differ when a run goes on; assumed: what those stand for that a checkpoint of an
    older version lacks. averages: further ones, of which every checkpoint leaves a snapshot in `<output>/averages`.
    """

    output: Path
    net: nn.Module
    ema: Ema
    optimiser: torch.optim.Optimizer
    facts: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 2
    averages: Sequence[PowerAverage] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)

    def save(self, step: int, state: Mapping[str, Any], write: bool = True) -> Path:
        """Write the state after `step` steps; older checkpoints beyond `keep` go only after the new one is read back. write:
        False on the processes that only lend their shards.

        Raises NumericalError, and writes nothing, where a weight is not finite; EnvironmentFault where the disk is full.
        """
        held = {"weights": self.net.state_dict(), "ema": self.ema.shadow}
        held |= {f"average-{i}": average.shadow for i, average in enumerate(self.averages)}
        held = {
            name: whole_dict(tensors) for name, tensors in {**held, "optimiser": optimisers.tensors(self.optimiser)}.items()
        }
        _check_finite({**held["weights"], **{f"ema.{n}": t for n, t in held["ema"].items()}}, step)
        folder = self.output / f"step-{step:06d}"
        if not write:
            return folder
        try:
            with files.new_folder(folder, replace=True) as temp:
                for name, tensors in held.items():
                    save_file(_owned(tensors), temp / f"{name}.safetensors")
                sums = {f.name: files.sha256(f) for f in sorted(temp.glob("*.safetensors"))}
                manifest = {"format": FORMAT, "step": step, "sha256": sums, "facts": dict(self.facts), "state": dict(state)}
                manifest["optimiser"] = optimisers.numbers(self.optimiser)
                (temp / "manifest.json").write_text(json.dumps(manifest, indent=1))
        except SafetensorError as error:
            raise EnvironmentFault(f"cannot write {str(folder)!r}: {error}") from error
        fault = fault_of(folder)
        if fault:
            raise EnvironmentFault(f"{str(folder)!r} cannot be read back: {fault}; the older checkpoints are kept")
        for average in self.averages:
            average.write(self.output / "averages", step)
        for old in _folders(self.output)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return folder

    def settle(self, found: Found) -> None:
        """Once the network is where it is trained: the averages lie where its weights do, and the optimiser's state too."""
        state = self.net.state_dict()
        averages: list[Ema | PowerAverage] = [self.ema, *self.averages]
        for average in averages:
            average.shadow = {n: like(t, state[n]) for n, t in average.shadow.items()}
        if found.step and any(found.optimiser):
            tensors, plain = found.optimiser
            placed = {n: like(t, self._parameter(n)) if t.ndim else t for n, t in tensors.items()}
            try:
                optimisers.restore(self.optimiser, placed, plain)
            except (RuntimeError, ValueError, KeyError) as error:
                raise UsageError(
                    f"the state of the optimiser cannot be used: {error!s:.200}; give another job.output"
                ) from error

    def _parameter(self, name: str) -> Tensor:
        """The parameter that a tensor of the optimiser's state belongs to."""
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        return trained[int(name.partition(".")[0])]

    def restore(self, say: Callable[[str], None] = print, allow_changed: bool = False) -> Found:
        """Load the newest valid checkpoint. A broken one is named, skipped and put aside as `<name>.broken`.

        Raises UsageError where the run was begun with other facts, unless `allow_changed`.
        """
        for folder in _folders(self.output):
            fault = fault_of(folder)
            if fault:
                say(f"skipping {folder.name}: {fault}")
                continue
            manifest = json.loads((folder / "manifest.json").read_text())
            before = manifest.get("facts", {})
            self._compare(before, say, allow_changed)
            self._load(folder)
            say(f"resuming after step {manifest['step']}")
            held = load_file(folder / "optimiser.safetensors"), manifest.get("optimiser", {})
            if before and self._then(before, "job.optimiser") != self.facts.get("job.optimiser"):
                held = {}, {}
                say("the optimiser is another one: its state begins anew")
            return Found(int(manifest["step"]), manifest.get("state", {}), held)
        return Found()

    def put_broken_aside(self) -> None:
        """Rename the checkpoints that cannot be used, so that a new one of their step does not replace them."""
        for folder in _folders(self.output):
            if fault_of(folder):
                free = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.broken{n}").exists())
                os.replace(folder, folder.with_name(f"{folder.name}.broken{free}"))

    def _compare(self, before: Mapping[str, Any], say: Callable[[str], None], allow_changed: bool) -> None:
        now = json.loads(json.dumps(dict(self.facts)))
        for key in [k for k in {**before, **now} if before and self._then(before, k) != now.get(k)]:
            change = f"{key} was {self._then(before, key)!r:.80} when this run began and is {now.get(key)!r:.80} now"
            if not allow_changed:
                raise UsageError(f"{change}; --allow-changed goes on all the same, another job.output begins anew")
            say(f"{change}: going on as allowed")

    def _then(self, before: Mapping[str, Any], key: str) -> Any:
        """A fact of the checkpoint."""
        return before[key] if key in before else json.loads(json.dumps(self.assumed.get(key)))

    def _load(self, folder: Path) -> None:
        try:
            self.net.load_state_dict(load_file(folder / "weights.safetensors"))
            self.ema.shadow = load_file(folder / "ema.safetensors")
            for i, average in enumerate(self.averages):
                average.shadow = load_file(folder / f"average-{i}.safetensors")
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[-1].strip()
            raise UsageError(f"{folder.name} is of another network: {first:.200}; give another job.output") from error


def tidy(output: Path) -> None:
    """Remove what a killed run left half written; a folder that was put aside to be replaced comes back."""
    for aside in output.glob(".ldm-old-*"):
        for folder in aside.iterdir():
            if not (output / folder.name).exists():
                os.replace(folder, output / folder.name)
    for left in output.glob(".ldm-*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def check_space(output: Path, net: nn.Module, keep: int) -> None:
    """Raise EnvironmentFault where the disk cannot hold the checkpoints of a run: weights, average and two moments each."""
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    need, free = (2 * size + 2 * trained) * (keep + 1), shutil.disk_usage(output).free
    if need > free:
        raise EnvironmentFault(f"{keep + 1} checkpoints take {need >> 20} MB and {str(output)!r} has {free >> 20} MB left")


def export(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, whole or not at all; an older export is replaced once the new one stands."""
    with files.new_folder(folder, replace=True) as temp:
        write(temp)


def fault_of(folder: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] not in READS:
            return f"format {manifest['format']}, this version reads {' and '.join(map(str, READS))}"
        wrong = [name for name, digest in manifest["sha256"].items() if files.sha256(folder / name) != digest]
        return f"{wrong[0]} does not have the SHA-256 of the manifest" if wrong else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest or a file of it cannot be read ({type(error).__name__})"


def _folders(output: Path) -> list[Path]:
    """The checkpoints, newest first."""
    found = [f for f in output.glob("step-*") if f.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda f: int(f.name.removeprefix("step-")), reverse=True)


def _check_finite(state: Mapping[str, Tensor], step: int) -> None:
    bad = [n for n, t in state.items() if not torch.isfinite(t).all()]
    if bad:
        raise NumericalError(f"{bad[0]} is not finite after step {step}; nothing is saved and the last checkpoint is kept")


def _owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that safetensors takes: contiguous, none sharing memory."""
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
