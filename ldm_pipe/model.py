"""A network with its path and its prediction becomes a Denoiser: (x, level) -> Estimate. Every method sees only that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ldm_pipe.cond import ROWS, Cond, Rows
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.prediction import Prediction


class Estimate(NamedTuple):
    """What a denoiser makes of x: the clean image and the noise, [B,C,H,W].

    log_var: a learned variance's raw half in -1..1, interpolating between the two bounds of the reverse variance
    (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15); None for other networks.
    """

    x0: Tensor
    noise: Tensor
    log_var: Tensor | None = None

    def with_x0(self, change: Callable[[Tensor], Tensor], x: Tensor, level: Level, keep_noise: bool = False) -> Estimate:
        """The estimate with a changed x0. The noise follows from it, unless the method keeps the network's own."""
        x0 = change(self.x0)
        return Estimate(x0, self.noise if keep_noise else level.noise(x, x0), self.log_var)


class Denoiser(Protocol):
    """Any callable (x, level) -> Estimate; x: [B,C,H,W] in at least fp32."""

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        """Estimate x0 and noise of an x that lies at `level`."""


class Network(Protocol):
    """A raw network: (x [B,C,H,W], time [B], cond) -> output [B,C,H,W] (or [B,2C,H,W] with a learned variance)."""

    def __call__(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The output, in whatever the network predicts."""


CondAt = Callable[[Level], Cond]


class Model(nn.Module):
    """Network + Path + Prediction. The network runs in its own dtype, x and the estimates stay in at least fp32.

    `evaluations` counts, over the life of the model, how many images the network has seen for each branch. (Threads that share
    a model may lose counts here; the counts of a run, in its `Branches`, are exact.)
    """

    def __init__(self, network: Network, path: Path, prediction: Prediction, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network, self.path, self.prediction, self.dtype = network, path, prediction, dtype
        self.evaluations: Counter[str] = Counter()

    def raw(self, x: Tensor, level: Level, cond: Cond) -> tuple[Tensor, Tensor, Level]:
        """(inside, out, own): x as the network takes it, its output, and its level there. `level` holds floats, or one
        [B,1,1,1] tensor each when training; own has x0 / path.data_std as its clean image."""
        scale, own = self.path.rescale(level)
        time = torch.as_tensor(self.path.time(level), dtype=torch.float32, device=x.device).flatten().expand(len(x))
        inside = x * scale
        return inside, self.network(inside.to(self.dtype or x.dtype), time, cond).to(x.dtype), own

    def forward(self, x: Tensor, level: Level, cond: Cond) -> Estimate:
        """One evaluation: x [B,C,H,W] at `level` under B conditions."""
        inside, out, own = self.raw(x, level, cond)
        log_var = None
        if out.shape[1] == 2 * x.shape[1]:  # a learned variance is split off before any guidance
            out, log_var = out.chunk(2, dim=1)
        x0 = self.prediction.x0(inside, out, own)
        return Estimate(x0 * self.path.data_std, self.prediction.noise(inside, out, own), log_var)

    def bind(self, cond: Cond | CondAt, name: str = "cond") -> Denoiser:
        """A Denoiser under one condition."""
        branches = self.branches(**{name: cond})
        return lambda x, level: branches(x, level, (name,))[name]

    def branches(self, **conds: Cond | CondAt) -> Branches:
        """Several estimates of one x from one batched call; a condition may be a function of the level."""
        return Branches(self, conds)


@dataclass(frozen=True, eq=False)
class Branches:
    """The named conditions of one run. Make it fresh for every run: `evaluations` counts images per branch.

    `others` are branches that another denoiser answers (a weaker model, a perturbed network); they win over `conds`.
    """

    model: Model
    conds: Mapping[str, Cond | CondAt]
    others: Mapping[str, Denoiser] = field(default_factory=dict)
    evaluations: Counter[str] = field(default_factory=Counter)

    def __call__(
        self, x: Tensor, level: Level, names: Sequence[str], rows: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Estimate]:
        """Estimates of x [B,C,H,W] for the named branches, those of this model from one call.

        rows: the images for which a branch is wanted, where that is not all; its estimate is NaN for the others. A branch that
        is wanted for none is left out; one that another denoiser answers is asked for all or for none.
        """
        names = [n for n in names if len((rows or {}).get(n, x))]
        few = {n: list(r) for n, r in (rows or {}).items() if n in names and n not in self.others and len(r) < len(x)}
        for name in names:
            if name not in self.others:
                self.cond(name)
        estimates = {n: self.others[n](x, level) for n in names if n in self.others}
        for n in names:
            self.evaluations[n] += len(few.get(n, x))
        own = [n for n in names if n not in self.others]
        if own:
            estimates |= self._together(x, level, own, few)
        return {n: _spread(estimates[n], few[n], len(x)) if n in few else estimates[n] for n in names}

    def cond(self, name: str) -> Cond | CondAt:
        """The condition of one branch. Raises UsageError where there is none."""
        if name not in self.conds:
            raise UsageError(f"the guidance needs a branch {name!r}; this run has {', '.join(self.conds)}")
        return self.conds[name]

    def own(self, name: str, branch: str) -> Denoiser:
        """This model under the condition of a branch, for a rule that changes its network or its x and calls the result
        `branch`; the run counts it where the rule's branch is asked for."""
        return self.model.bind(self.cond(name), branch)

    def _together(self, x: Tensor, level: Level, names: Sequence[str], few: Mapping[str, list[int]]) -> dict[str, Estimate]:
        """Estimates of the model itself, in one batch, each of the rows that are wanted."""
        conds = [self._cond(n, level) for n in names]
        conds = [c.take(few[n]) if n in few else c for n, c in zip(names, conds, strict=True)]
        inside = [x[few[n]] if n in few else x for n in names]
        counts = tuple(len(part) for part in inside)
        token = ROWS.set(Rows(tuple(names), len(x), level, counts if few else ()))
        try:
            both = self.model(torch.cat(inside) if len(names) > 1 else inside[0], level, Cond.cat(conds))
        finally:
            ROWS.reset(token)
        self.model.evaluations.update(dict(zip(names, counts, strict=True)))
        return dict(zip(names, _split(both, counts), strict=True))

    def _cond(self, name: str, level: Level) -> Cond:
        cond = self.conds[name]
        return cond if isinstance(cond, Cond) else cond(level)


def _split(estimate: Estimate, counts: Sequence[int]) -> list[Estimate]:
    parts = [torch.split(t, list(counts)) if t is not None else (None,) * len(counts) for t in estimate]
    return [Estimate(*row) for row in zip(*parts, strict=True)]  # type: ignore[arg-type]


def _spread(estimate: Estimate, rows: list[int], size: int) -> Estimate:
    """The estimate of some rows as one of all `size` rows, NaN elsewhere, so that nothing uses them unnoticed."""
    whole = [None if t is None else t.new_full((size, *t.shape[1:]), torch.nan) for t in estimate]
    for there, part in zip(whole, estimate, strict=True):
        if there is not None and part is not None:
            there[rows] = part
    return Estimate(*whole)  # type: ignore[arg-type]


class Rule(Protocol):
    """How branches combine. A branch that is not needed at a level is not evaluated there. Rules nest, by a field `rule`.

    A rule may also have `fresh() -> Rule`, itself without the state of earlier runs (a wrapped rule is made fresh by itself);
    `others(branches) -> {name: Denoiser}`, the branches that it brings along; and `rows(level) -> {name: rows}`, the images
    for which a branch is needed, where that is not all.
    """

    def needs(self, level: Level) -> tuple[str, ...]:
        """Names of the branches that this level needs."""

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        """Combine the estimates of the needed branches."""


def guided(branches: Branches, rule: Rule) -> Denoiser:
    """The Denoiser that a rule makes of branches: the rule made fresh, the branches joined by those that it brings along."""
    active = _fresh(rule)
    parts = chain(active)
    for part in parts:
        if hasattr(part, "others"):
            branches = replace(branches, others={**branches.others, **part.others(branches)})

    def denoise(x: Tensor, level: Level) -> Estimate:
        rows = {n: r for part in parts if hasattr(part, "rows") for n, r in part.rows(level).items()}
        return active(branches(x, level, active.needs(level), rows), x, level)

    return denoise


def chain(rule: Any) -> list[Any]:
    """A rule and those that it wraps as `rule`, the innermost first."""
    return [*(chain(rule.rule) if hasattr(rule, "rule") else ()), rule]


def _fresh(rule: Any) -> Rule:
    """The rule without the state of earlier runs, also in the rules that it wraps as `rule`."""
    if hasattr(rule, "rule"):
        rule = replace(rule, rule=_fresh(rule.rule))
    return rule.fresh() if hasattr(rule, "fresh") else rule
