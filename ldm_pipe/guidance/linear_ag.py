"""LinearAG: Adaptive Guidance, Castillo et al. 2023, arXiv 2312.12487, section 5: the other branch from what is known.

The noise of the negative branch is nearly a linear combination of the noises seen so far, with one number per step and per
earlier estimate, the same for all pixels and all prompts. `solve` finds these numbers from recorded runs of plain guidance. Of
the negative noises only those that were evaluated are combined, so that no guess is made of guesses (the paper combines all).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ldm_pipe import files, inputs, strict
from ldm_pipe.errors import UsageError
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.level import Level
from ldm_pipe.model import Estimate
from ldm_pipe.prediction import EPS
from ldm_pipe.settings import Settings

Seen = tuple[float, Tensor, Tensor]  # u, and the noises of the positive and of the negative branch, [B,...]
SLACK = 1e-6  # by which the u of a level may differ from the fit's


@dataclass(frozen=True)
class Fit:
    """The numbers of one setting, which fit no other. levels: u of every evaluation; own, other: of evaluation t, t + 1 numbers
    for the positive noises so far, and one for every negative noise before t that is evaluated, not guessed."""

    sampler: str
    steps: int
    scale: float
    levels: tuple[float, ...]
    own: tuple[tuple[float, ...], ...]
    other: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        count = len(self.levels)
        sizes = [(t + 1, sum(exact(i, count) for i in range(t))) for t in range(count)]
        given = [(len(a), len(b)) for a, b in zip(self.own, self.other, strict=False)]
        if not len(self.own) == len(self.other) == count or given != sizes:
            raise UsageError("a fit holds t + 1 numbers for evaluation t, and one for every negative noise that is known there")

    @classmethod
    def read(cls, path: str) -> Fit:
        """From a JSON file. Raises UsageError where it is not of the form."""
        text = inputs.text(path, "linear_ag:")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"linear_ag: {path!r} cannot be read as JSON: {type(error).__name__}") from error
        if not isinstance(found, dict):
            raise UsageError(f"linear_ag: {path!r} does not hold an object")
        return strict.build(cls, found, f"the fit {path!r}")

    def write(self, path: str | os.PathLike[str], replace: bool = False) -> None:
        """Into a JSON file."""
        files.write(path, (json.dumps(dataclasses.asdict(self)) + "\n").encode(), replace=replace)


@dataclass(frozen=True)
class LinearAG:
    """CFG that guesses the negative noise: at every second level of the first half, and at all of the second.

    fit: `Fit`, or its JSON file; it names the sampler, the steps and the scale, and other ones are refused. Works in the noise,
    whatever the network predicts. 20 evaluations of the positive branch take 5 of the negative one.
    """

    fit: str | Fit
    positive: str = "cond"
    negative: str = "uncond"
    _fit: list[Fit] = field(default_factory=list, init=False, repr=False, compare=False)
    _own: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _other: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._fit.append(self.fit if isinstance(self.fit, Fit) else Fit.read(self.fit))

    def fresh(self) -> LinearAG:
        """The rule at the start of a run."""
        return replace(self, fit=self._fit[0])

    def suits(self, given: Settings) -> None:
        """Raises UsageError where the run is not that of the fit."""
        fit = self._fit[0]
        if (given.sampler, given.steps) != (fit.sampler, fit.steps):
            made = f"{fit.steps} steps of {fit.sampler}"
            raise UsageError(f"linear_ag: the fit is of {made}; this run has {given.steps} of {given.sampler}")

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches where the negative one is not guessed."""
        evaluated = exact(len(self._own), len(self._fit[0].levels))
        return (self.positive, self.negative) if evaluated else (self.positive,)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """The guided estimate. Raises UsageError at a level that is not the fit's."""
        fit, t, p = self._fit[0], len(self._own), estimates[self.positive]
        if t >= len(fit.levels) or abs(float(level.u) - fit.levels[t]) > SLACK:
            raise UsageError(f"linear_ag: evaluation {t + 1} is at u = {float(level.u):.4f}, and the fit has other levels")
        if exact(t, len(fit.levels)):
            n = estimates[self.negative]
            self._other.append(n.noise)
        else:
            noise = self._guess(fit, t, p.noise)
            n = Estimate(EPS.x0(x, noise, level), noise)
        self._own.append(p.noise)
        return CFG(fit.scale)({"cond": p, "uncond": n}, x, level)

    def _guess(self, fit: Fit, t: int, noise: Tensor) -> Tensor:
        known = [*zip(fit.own[t], [*self._own, noise], strict=True), *zip(fit.other[t], self._other, strict=True)]
        return sum((number * tensor for number, tensor in known[1:]), known[0][0] * known[0][1])


def exact(t: int, count: int) -> bool:
    """Is the negative branch evaluated, not guessed, at evaluation t of `count`?"""
    return t % 2 == 0 and t < (count + 1) // 2


@dataclass(frozen=True)
class Recording:
    """CFG that notes every evaluation, a list for every run: what `solve` takes."""

    scale: float
    runs: list[list[Seen]] = field(default_factory=list)

    def fresh(self) -> Recording:
        """The same list of runs, with a new one begun."""
        self.runs.append([])
        return self

    def needs(self, level: Level) -> tuple[str, ...]:
        """Both branches."""
        return ("cond", "uncond")

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """CFG's estimate."""
        p, n = estimates["cond"], estimates["uncond"]
        self.runs[-1].append((float(level.u), p.noise.double().cpu(), n.noise.double().cpu()))
        return CFG(self.scale)(estimates, x, level)


def solve(runs: Sequence[Sequence[Seen]], sampler: str, steps: int, scale: float) -> Fit:
    """The fit of recorded runs by least squares, evaluation by evaluation, over all images and pixels.

    Raises UsageError where the runs differ in their levels or are none.
    """
    runs = [run for run in runs if run]
    levels = tuple(seen[0] for seen in runs[0]) if runs else ()
    if not runs or any(tuple(seen[0] for seen in run) != levels for run in runs):
        raise UsageError("linear_ag: a fit takes runs that went along the same levels")
    own = [torch.cat([run[t][1].flatten() for run in runs]) for t in range(len(levels))]
    other = [torch.cat([run[t][2].flatten() for run in runs]) for t in range(len(levels))]
    found = []
    for t in range(len(levels)):
        known = [*own[: t + 1], *(other[i] for i in range(t) if exact(i, len(levels)))]
        numbers = torch.linalg.lstsq(torch.stack(known, 1), other[t][:, None], rcond=1e-12, driver="gelsd").solution[:, 0]
        found.append((tuple(numbers[: t + 1].tolist()), tuple(numbers[t + 1 :].tolist())))
    return Fit(sampler, steps, scale, levels, tuple(a for a, _ in found), tuple(b for _, b in found))
