"""Checkpoints that survive a kill: temp folder, SHA-256 manifest, rename; tensors in safetensors, the rest in JSON.

    <output>/step-000500/  weights.safetensors  ema.safetensors  optimiser.safetensors  manifest.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm_pipe import files
from train.ema import Ema

FORMAT = 1


def save(output: Path, step: int, net: nn.Module, ema: Ema, optimiser: torch.optim.Optimizer, keep: int = 2) -> Path:
    """Write the state after `step` steps; older checkpoints beyond `keep` go only after the new one stands."""
    folder = output / f"step-{step:06d}"
    with files.new_folder(folder, replace=True) as temp:
        save_file(_owned(net.state_dict()), temp / "weights.safetensors")
        save_file(_owned(ema.shadow), temp / "ema.safetensors")
        save_file(_optimiser_tensors(optimiser), temp / "optimiser.safetensors")
        sums = {f.name: files.sha256(f) for f in sorted(temp.glob("*.safetensors"))}
        manifest = {"format": FORMAT, "step": step, "sha256": sums}
        (temp / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for old in sorted(output.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def restore(
    output: Path, net: nn.Module, ema: Ema, optimiser: torch.optim.Optimizer, say: Callable[[str], None] = print
) -> int:
    """Load the newest valid checkpoint of `output` and return its step (0: none). A broken one is named and skipped."""
    for folder in sorted(output.glob("step-*"), reverse=True):
        fault = _fault(folder)
        if fault:
            say(f"skipping {folder.name}: {fault}")
            continue
        net.load_state_dict(load_file(folder / "weights.safetensors"))
        ema.shadow = load_file(folder / "ema.safetensors")
        _restore_optimiser(optimiser, load_file(folder / "optimiser.safetensors"))
        step = int(json.loads((folder / "manifest.json").read_text())["step"])
        say(f"resuming after step {step}")
        return step
    return 0


def export(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, whole or not at all; an older export is replaced once the new one stands."""
    with files.new_folder(folder, replace=True) as temp:
        write(temp)


def _fault(folder: Path) -> str:
    """Why a checkpoint cannot be used, or an empty string."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        wrong = [name for name, digest in manifest["sha256"].items() if files.sha256(folder / name) != digest]
        return f"{wrong[0]} does not have the SHA-256 of the manifest" if wrong else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"


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
