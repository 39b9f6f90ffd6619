"""The optimisers that a job can name, and their state as tensors and numbers, so that a checkpoint needs no pickle.

adamw: Decoupled Weight Decay Regularization, Loshchilov and Hutter 2017, arXiv 1711.05101. adamw8bit: 8-bit Optimizers via
Block-wise Quantization, Dettmers et al. 2021, arXiv 2110.02861. schedulefree: The Road Less Scheduled, Defazio et al. 2024,
arXiv 2405.15682. adafactor: Shazeer and Stern 2018, arXiv 1804.04235. prodigy: Mishchenko and Defazio 2023, arXiv 2306.06101.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm_pipe.errors import UsageError
from train.ema import Ema
from train.job import Job

PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "schedulefree": ("schedulefree", "AdamWScheduleFree"),
    "prodigy": ("prodigyopt", "Prodigy"),
}


def make(job: Job, trained: Sequence[nn.Parameter]) -> Any:
    """The optimiser that `job.optimiser` names. Raises UsageError where its package is not installed."""
    if job.optimiser == "adamw":
        return torch.optim.AdamW(trained, lr=job.lr, betas=job.betas, weight_decay=job.weight_decay, fused=True)
    if job.optimiser == "adafactor":
        return torch.optim.Adafactor(trained, lr=job.lr, weight_decay=job.weight_decay)
    package, name = PACKAGES[job.optimiser]
    try:
        kind = getattr(importlib.import_module(package), name)
    except ImportError as error:
        words = f"job.optimiser {job.optimiser} needs the package {package.partition('.')[0]}"
        raise UsageError(f"{words}: pip install 'ldm_pipe[optimisers]'") from error
    made = kind(trained, lr=job.lr, betas=job.betas, weight_decay=job.weight_decay)
    for group in made.param_groups:
        if "train_mode" in group:
            group["train_mode"] = True  # as `train()` does, which would make empty slots too
    return made


class Inside(Ema):
    """The average x that a schedule-free optimiser keeps of its fast weights z, read off without touching the weights y.

    y = (1 - beta) z + beta x (eq. 1), so x = y + (1 - 1 / beta) (z - y). Going to x and back in place, as `eval()` and
    `train()` of the package do, would cost y its last bits.
    """

    def __init__(self, net: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        super().__init__(net, 0.0)
        self.optimiser = optimiser

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """The average after the optimiser's last step."""
        beta = self.optimiser.param_groups[0]["betas"][0]
        fast = {n: self.optimiser.state[p]["z"] for n, p in net.named_parameters() if "z" in self.optimiser.state.get(p, {})}
        for name, value in net.state_dict().items():
            self.shadow[name].copy_(value.lerp(fast[name], 1 - 1 / beta) if name in fast else value)


def average(job: Job, net: nn.Module, optimiser: torch.optim.Optimizer) -> Ema:
    """What is validated and exported: a moving average, or the optimiser's own."""
    return Inside(net, optimiser) if job.optimiser == "schedulefree" else Ema(net, job.ema)


# --- state


def tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of the state, named "<number of the parameter>.<slot>"."""
    return {f"{i}.{k}": v for i, slots in _slots(optimiser) for k, v in slots.items() if isinstance(v, Tensor)}


def numbers(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What else the state holds, fit for JSON: numbers of parameters, and of groups what the optimiser itself has moved."""
    plain = {str(i): {k: v for k, v in slots.items() if isinstance(v, int | float)} for i, slots in _slots(optimiser)}
    moved = [
        {k: v for k, v in group.items() if k not in ("params", "lr") and v != optimiser.defaults.get(k)}
        for group in optimiser.param_groups
    ]
    return {"state": {i: slots for i, slots in plain.items() if slots}, "groups": moved}


def restore(optimiser: torch.optim.Optimizer, held: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give an optimiser of the same parameters the state that `tensors` and `numbers` told."""
    state: dict[int, dict[str, Any]] = {int(i): dict(slots) for i, slots in plain.get("state", {}).items()}
    for name, tensor in held.items():
        i, slot = name.split(".", 1)
        state.setdefault(int(i), {})[slot] = tensor
    groups = optimiser.state_dict()["param_groups"]
    for group, moved in zip(groups, plain.get("groups", [{}] * len(groups)), strict=True):
        group |= moved
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _slots(optimiser: torch.optim.Optimizer) -> Iterator[tuple[int, dict[str, Any]]]:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return ((i, optimiser.state[p]) for i, p in enumerate(parameters) if p in optimiser.state)
