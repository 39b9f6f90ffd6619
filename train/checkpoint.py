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
from train.ema import Ema
from train.post_hoc import PowerAverage

FORMAT = 2
READS = (1, 2)  # 1 had no `facts` and no `state`


@dataclass(frozen=True)
class Found:
    """The checkpoint a run goes on from. step: steps that are done (0: a new run). state: what the loop had put in."""

    step: int = 0
    state: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keeper:
    """Writes and reads the checkpoints of one run.

    facts: flat names and values that must not differ when a run goes on. averages: further ones, of which every checkpoint
    leaves a snapshot in `<output>/averages`.
    """

    output: Path
    net: nn.Module
    ema: Ema
    optimiser: torch.optim.Optimizer
    facts: Mapping[str, Any] = field(default_factory=dict)
    keep: int = 2
    averages: Sequence[PowerAverage] = ()

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `step` steps; older checkpoints beyond `keep` go only after the new one is read back.

        Raises NumericalError, and writes nothing, where a weight is not finite; EnvironmentFault where the disk is full.
        """
        _check_finite({**self.net.state_dict(), **{f"ema.{n}": t for n, t in self.ema.shadow.items()}}, step)
        folder = self.output / f"step-{step:06d}"
        try:
            with files.new_folder(folder, replace=True) as temp:
                save_file(_owned(self.net.state_dict()), temp / "weights.safetensors")
                save_file(_owned(self.ema.shadow), temp / "ema.safetensors")
                for i, average in enumerate(self.averages):
                    save_file(_owned(average.shadow), temp / f"average-{i}.safetensors")
                save_file(_optimiser_tensors(self.optimiser), temp / "optimiser.safetensors")
                sums = {f.name: files.sha256(f) for f in sorted(temp.glob("*.safetensors"))}
                manifest = {"format": FORMAT, "step": step, "sha256": sums, "facts": dict(self.facts), "state": dict(state)}
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

    def to(self, device: torch.device) -> None:
        """Keep the averages on a device."""
        self.ema.shadow = {n: t.to(device) for n, t in self.ema.shadow.items()}
        for average in self.averages:
            average.shadow = {n: t.to(device) for n, t in average.shadow.items()}

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
            self._compare(manifest.get("facts", {}), say, allow_changed)
            self._load(folder)
            say(f"resuming after step {manifest['step']}")
            return Found(int(manifest["step"]), manifest.get("state", {}))
        return Found()

    def put_broken_aside(self) -> None:
        """Rename the checkpoints that cannot be used, so that a new one of their step does not replace them."""
        for folder in _folders(self.output):
            if fault_of(folder):
                free = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.broken{n}").exists())
                os.replace(folder, folder.with_name(f"{folder.name}.broken{free}"))

    def _compare(self, before: Mapping[str, Any], say: Callable[[str], None], allow_changed: bool) -> None:
        now = json.loads(json.dumps(dict(self.facts)))
        for key in [k for k in {**before, **now} if before and before.get(k) != now.get(k)]:
            change = f"{key} was {before.get(key)!r:.80} when this run began and is {now.get(key)!r:.80} now"
            if not allow_changed:
                raise UsageError(f"{change}; --allow-changed goes on all the same, another job.output begins anew")
            say(f"{change}: going on as allowed")

    def _load(self, folder: Path) -> None:
        try:
            self.net.load_state_dict(load_file(folder / "weights.safetensors"))
            self.ema.shadow = load_file(folder / "ema.safetensors")
            for i, average in enumerate(self.averages):
                average.shadow = load_file(folder / f"average-{i}.safetensors")
            _restore_optimiser(self.optimiser, load_file(folder / "optimiser.safetensors"))
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


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return _owned({f"{i}.{k}": v for i, slots in state.items() for k, v in slots.items()})


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        i, slot = name.split(".", 1)
        state.setdefault(int(i), {})[slot] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
