"""What happened in a run, step by step, in one open file: safetensors, with JSON in its metadata.

Tensors: levels [S+1,2] (alpha, sigma; float64), x0 [S,N,C,h,w] (the estimate of every step, which is guided), guidance [S,N]
(the root mean square of what guidance moved x0 by, at the first evaluation of the step; 0 where it did nothing), evaluations
[S] (images the network saw in the step, over all branches), change [S,N] (of x0 since the step before, root mean square). The
metadata key "ldm_pipe.record" holds the prompts, the seeds and the settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import files
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate, Rule
from ldm_pipe.plan import Plan
from ldm_pipe.walk import Step

KEY, FORMAT = "ldm_pipe.record", 1


@dataclass(frozen=True)
class Watched:
    """A rule that behaves as `rule` does and notes, at every call, (images seen by the network, the guidance of each image)."""

    rule: Rule
    seen: list[tuple[int, Tensor]] = field(default_factory=list, compare=False)

    def needs(self, level: Level) -> tuple[str, ...]:
        """The rule's."""
        return self.rule.needs(level)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The rule's."""
        made = self.rule(estimates, x, level)
        plain = estimates.get("cond", made)
        # A branch that was asked for some images only holds NaN for the others.
        asked = sum(int(e.x0.flatten(1).isfinite().all(1).sum()) for e in estimates.values())
        self.seen.append((asked, _size(made.x0 - plain.x0)))
        return made


@dataclass(frozen=True, eq=False)
class Recorder:
    """Follows the run of a plan: run `watched`, call `note` after every step of every batch, then `write`.

    size: the longer side of the recorded x0 in latent pixels, averaged down; 0 keeps theirs.
    """

    plan: Plan
    size: int = 0
    rule: Watched = field(init=False)
    batches: list[list[dict[str, Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", Watched(self.plan.rule))

    @property
    def watched(self) -> Plan:
        """The plan to run in place of the given one: it makes the same images."""
        return dataclasses.replace(self.plan, rule=self.rule)

    def note(self, step: Step) -> None:
        """One step is done."""
        if step.number == 0:
            if self.batches and len(self.batches[-1]) < len(self.plan.levels) - 1:
                self.batches.pop()  # memory ran out in it, and it is run again in parts
            self.batches.append([])
        x0 = step.estimate.x0.detach().float().cpu()
        before = self.batches[-1][-1]["full"] if self.batches[-1] else x0
        seen = list(self.rule.seen)
        self.rule.seen.clear()
        guidance = seen[0][1].float().cpu() if seen else torch.zeros(len(x0))
        row = {"x0": _smaller(x0, self.size), "guidance": guidance, "change": _size(x0 - before), "full": x0}
        if self.batches[-1]:
            del self.batches[-1][-1]["full"]
        self.batches[-1].append(row | {"evaluations": torch.tensor(sum(n for n, _ in seen))})

    def data(self) -> bytes:
        """The file. Raises UsageError where no step was run, or a batch was left before its end."""
        lengths = {len(b) for b in self.batches}
        if len(lengths) != 1:
            raise UsageError("nothing to record: no batch was run to its end")
        from safetensors.torch import save

        steps = list(zip(*self.batches, strict=True))
        tensors = {n: torch.stack([torch.cat([b[n] for b in step]) for step in steps]) for n in ("x0", "guidance", "change")}
        tensors["evaluations"] = torch.stack([torch.stack([b["evaluations"] for b in step]).sum() for step in steps])
        walk = self.plan.levels[: len(steps) + 1]
        tensors["levels"] = torch.tensor([[float(lv.alpha), float(lv.sigma)] for lv in walk], dtype=torch.float64)
        return bytes(save({n: t.contiguous() for n, t in tensors.items()}, {KEY: self._facts()}))

    def write(self, path: str | os.PathLike[str], replace: bool = False) -> Path:
        """Write the file, whole or not at all."""
        return files.write(path, self.data(), replace=replace)

    def _facts(self) -> str:
        plan = self.plan
        facts = {"format": FORMAT, "prompts": plan.prompts, "seeds": plan.seeds, "negative_prompt": plan.negative}
        return json.dumps(facts | {"settings": dataclasses.asdict(self.plan.given)}, default=str)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of a recorded file. Raises UsageError on one that is not of the form."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is not a record of a run") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UsageError(f"{str(path)!r} is a record of another format; this version reads {FORMAT}")
    return tensors, facts


def _size(difference: Tensor) -> Tensor:
    """Root mean square of every image, [B]."""
    return difference.detach().float().flatten(1).square().mean(1).sqrt()


def _smaller(x0: Tensor, size: int) -> Tensor:
    height, width = x0.shape[-2:]
    if size == 0 or max(height, width) <= size:
        return x0
    part = size / max(height, width)
    return F.interpolate(x0, (max(1, round(height * part)), max(1, round(width * part))), mode="area")
