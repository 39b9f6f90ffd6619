"""Network + path + prediction is the closed-form denoiser again; branches share one call; rules start fresh."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import (
    CFG,
    EDM,
    EPS,
    FLOW,
    PREDICTIONS,
    VELOCITY,
    VP,
    Between,
    Cond,
    Estimate,
    Flow,
    Gaussian,
    Level,
    Model,
    Rescale,
    UsageError,
    guided,
)
from ldm_pipe.analysis import ExactNetwork

SPAN = torch.arange(12, dtype=torch.float64)
PRIOR = Gaussian(torch.cos(SPAN), 0.25 * 0.8 ** (SPAN[:, None] - SPAN).abs())
X = torch.randn(3, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
# Times that fp32, the clock of networks, holds exactly.
PATHS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "table": (VP.scaled_linear(), (0.0, 1.0, 250.0, 250.25, 999.0)),
    "zero terminal": (VP.linear().zero_terminal(), (0.0, 500.0, 998.0, 998.5)),
    "flow": (Flow(), (1.0, 250.0, 937.5)),
    "flow of unit clock": (Flow(scale=1.0), (0.125, 0.5, 0.75)),
    "edm": (EDM(), (-1.5, -0.25, 0.5, 1.0)),
}
coordinates = pytest.mark.parametrize("factor", [1.0, 0.3, 4.0])


def toy(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """A network whose output depends on all that it is given, row by row."""
    assert cond.tokens is not None
    return x * cond.tokens.reshape(-1, 1, 1, 1).to(x) + time.reshape(-1, 1, 1, 1).to(x) / 1000


def cond(*values: float) -> Cond:
    return Cond(tokens=torch.tensor(values)[:, None, None])


@coordinates
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())
@pytest.mark.parametrize("name", PATHS)
def test_a_model_around_the_gaussians_network_is_the_gaussian(name: str, prediction: Any, factor: float) -> None:
    """On every path, whatever it predicts, and for an x that lies on the network's own path or off it."""
    path, times = PATHS[name]
    denoise = Model(ExactNetwork((PRIOR,), path, prediction), path, prediction).bind(Cond())
    for time in times:
        level = path.level(time)
        level = Level(factor * level.alpha, factor * level.sigma)
        x = factor * level.mix(torch.cos(SPAN).reshape(3, 2, 2), X)
        ours, exact = denoise(x, level), PRIOR(x, level)
        size = max(1.0, float(exact.x0.abs().max()), float(exact.noise.abs().max()))
        assert float((ours.x0 - exact.x0).abs().max()) < 1e-10 * size
        assert float((ours.noise - exact.noise).abs().max()) < 1e-10 * size * max(1, 1 / level.sigma)


@pytest.mark.parametrize("path", [VP.linear().zero_terminal(), Flow()])
@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS.values() if p is not EPS])
def test_a_model_can_be_asked_about_pure_noise(path: Any, prediction: Any) -> None:
    found = Model(ExactNetwork((PRIOR,), path, prediction), path, prediction).bind(Cond())(X, Level(0.0, 1.0))
    assert torch.allclose(found.x0, PRIOR.mean.reshape(3, 2, 2).expand_as(X))
    assert torch.allclose(found.noise, X)


def test_an_eps_model_refuses_pure_noise_by_name() -> None:
    with pytest.raises(UsageError, match="eps"):
        Model(toy, Flow(), EPS)(X, Level(0.0, 1.0), cond(1, 1, 1))


@pytest.mark.parametrize("name", PATHS)
def test_training_levels_are_tensors(name: str) -> None:
    """`raw` with a level of [B,1,1,1] tensors is `raw` of each row with floats; the network's clock is fp32."""
    path, times = PATHS[name]
    rows = [path.level(t) for t in (*times, *times)[:3]]
    batch = Level(*(torch.tensor(v, dtype=torch.float64)[:, None, None, None] for v in zip(*rows, strict=True)))
    seen = []

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(time)
        return toy(x, time, cond)

    model, values = Model(network, path, VELOCITY), (1.0, 2.0, 3.0)
    whole = model.raw(X, batch, cond(*values))
    parts = [model.raw(X[k : k + 1], row, cond(values[k])) for k, row in enumerate(rows)]
    assert seen[0].shape == (3,)
    assert seen[0].dtype == torch.float32
    for k, (inside, out, own) in enumerate(parts):
        assert torch.allclose(whole[0][k], inside[0], atol=1e-12)
        assert torch.allclose(whole[1][k], out[0], atol=1e-6)
        assert [float(v[k]) for v in whole[2]] == pytest.approx(list(own))  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_the_network_runs_in_its_dtype_and_the_state_in_its_own(dtype: torch.dtype | None) -> None:
    for state, prediction in itertools.product((torch.float32, torch.float64), PREDICTIONS.values()):

        def network(x: Tensor, time: Tensor, cond: Cond, state: torch.dtype = state) -> Tensor:
            assert x.dtype == (dtype or state)
            assert time.dtype == torch.float32
            return x

        found = Model(network, Flow(), prediction, dtype)(X.to(state), Level(0.5, 0.5), Cond())
        assert found.x0.dtype == found.noise.dtype == state


def test_a_learned_variance_is_split_off() -> None:
    model = Model(lambda x, t, c: torch.cat([x, 7 * x], dim=1), Flow(), FLOW)
    plain = Model(lambda x, t, c: x, Flow(), FLOW)(X, Level(0.5, 0.5), Cond())
    for found in (
        model(X, Level(0.5, 0.5), Cond()),
        *model.branches(a=cond(1, 1, 1), b=cond(2, 2, 2))(X, Level(0.5, 0.5), ("a", "b")).values(),
    ):
        assert torch.equal(found.x0, plain.x0)
        assert found.log_var is not None
        assert torch.equal(found.log_var, 7 * X)
    assert plain.log_var is None


def test_branches_are_one_batched_call_equal_to_separate_ones() -> None:
    calls = []

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        calls.append(len(x))
        return toy(x, time, cond)

    model, level = Model(network, Flow(), FLOW), Level(0.4, 0.6)
    run = model.branches(cond=cond(1, 2, 3), uncond=cond(4, 5, 6), unused=cond(7, 8, 9))
    both = run(X, level, ("cond", "uncond"))
    assert calls == [6]
    assert list(both) == ["cond", "uncond"]
    for name, values in (("cond", (1, 2, 3)), ("uncond", (4, 5, 6))):
        assert torch.equal(both[name].x0, model(X, level, cond(*values)).x0)
        assert torch.equal(both[name].noise, model(X, level, cond(*values)).noise)
    assert run.evaluations == {"cond": 3, "uncond": 3}
    run(X, level, ("uncond",))
    assert run.evaluations == {"cond": 3, "uncond": 6}


def test_counts_are_fresh_for_every_run_and_total_on_the_model() -> None:
    model, level = Model(toy, Flow(), FLOW), Level(0.4, 0.6)
    for _ in range(2):
        run = model.branches(cond=cond(1, 1, 1))
        run(X, level, ("cond",))
        assert run.evaluations == {"cond": 3}
    model.bind(cond(1, 1, 1), "mine")(X, level)
    assert model.evaluations == {"cond": 6, "mine": 3}


def test_another_denoiser_can_answer_a_branch() -> None:
    model, level = Model(toy, Flow(), FLOW), Level(0.4, 0.6)
    run = replace(model.branches(cond=cond(1, 1, 1)), others={"weak": PRIOR})
    found = run(X, level, ("cond", "weak"))
    assert torch.equal(found["weak"].x0, PRIOR(X, level).x0)
    assert torch.equal(found["cond"].x0, model(X, level, cond(1, 1, 1)).x0)
    assert run.evaluations == {"cond": 3, "weak": 3}
    assert model.evaluations == {"cond": 3}
    assert list(run(X, level, ("weak",))) == ["weak"]


def test_a_missing_branch_is_named() -> None:
    run = Model(toy, Flow(), FLOW).branches(cond=cond(1, 1, 1))
    with pytest.raises(UsageError, match="needs a branch 'uncond'; this run has cond"):
        guided(run, CFG(2))(X, Level(0.5, 0.5))


def test_a_condition_may_follow_the_level() -> None:
    model = Model(toy, Flow(), FLOW)
    denoise = model.bind(lambda level: cond(*[float(level.u)] * 3))
    level = Level(0.25, 0.75)
    assert torch.equal(denoise(X, level).x0, model(X, level, cond(0.75, 0.75, 0.75)).x0)


def test_with_x0_says_whether_the_noise_follows() -> None:
    level = Level(0.6, 0.8)
    estimate = PRIOR(X, level)._replace(log_var=X)
    follows, kept = (estimate.with_x0(lambda x0: x0 + 1, X, level, keep) for keep in (False, True))
    assert torch.equal(follows.x0, estimate.x0 + 1)
    assert torch.allclose(level.mix(follows.x0, follows.noise), X)
    assert torch.equal(kept.noise, estimate.noise)
    assert torch.equal(kept.x0, follows.x0)
    assert follows.log_var is X


@dataclass(frozen=True)
class Once:
    """A rule with run state: it counts the calls of its run."""

    seen: tuple[list[int], ...] = ()

    def fresh(self) -> Once:
        return Once(([],))

    def needs(self, level: Level) -> tuple[str, ...]:
        return ("cond",)

    def __call__(self, estimates: Mapping[str, Estimate], x: Tensor, level: Level) -> Estimate:
        self.seen[0].append(len(self.seen[0]))
        return estimates["cond"]._replace(log_var=torch.tensor(len(self.seen[0])))


@pytest.mark.parametrize("rule", [Once(), Between(0.0, 1.0, Once()), Rescale(0.0, Between(0.1, 0.9, Once()))])
def test_a_rule_with_state_starts_fresh_for_every_run_also_when_nested(rule: Any) -> None:
    for _ in range(2):
        denoise = guided(Model(toy, Flow(), FLOW).branches(cond=cond(1, 1, 1)), rule)
        counts = [denoise(X, Level(0.5, 0.5)).log_var for _ in range(3)]
        assert [int(c) for c in counts if c is not None] == [1, 2, 3]
