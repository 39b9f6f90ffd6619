"""Adaptive Guidance and LinearAG on a mixture whose denoiser is known: the trap at the first step, counts, the sub-batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import (
    CFG,
    CLEAN,
    EPS,
    VP,
    Cond,
    Estimate,
    Level,
    Mixture,
    Model,
    Noise,
    Settings,
    UsageError,
    guided,
    levels,
    sample,
)
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.cond import Rows
from ldm_pipe.guidance.adaptive import Adaptive
from ldm_pipe.guidance.linear_ag import Fit, LinearAG, Recording, solve
from ldm_pipe.model import Branches
from ldm_pipe.samplers.ddim import DDIM

STEPS = 20
WALK = [lv for lv in levels.trailing(VP.scaled_linear(), STEPS) if lv.sigma] + [CLEAN]
SHAPE = (4, 4, 4)


def means() -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).double()


PRIOR = Mixture.isotropic(torch.full((8,), 0.125), means(), 0.3)
OF = PRIOR.given(torch.eye(8, dtype=torch.float64)[0])


def run_of(size: int) -> Branches:
    model = Model(ExactNetwork((PRIOR, OF), VP.scaled_linear(), EPS), VP.scaled_linear(), EPS)
    conds = {n: Cond(extras={"label": torch.full((size,), k)}) for k, n in enumerate(("uncond", "cond"))}
    return model.branches(**conds)


def walked(rule: Any, seeds: range = range(4)) -> tuple[Tensor, Branches]:
    run, noise = run_of(len(seeds)), Noise(tuple(seeds), SHAPE, dtype=torch.float64)
    return sample(guided(run, rule), DDIM().start(noise.start(), WALK[0]), WALK, DDIM(), noise), run


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_without_a_guard_it_stops_at_the_first_step_and_is_wrong() -> None:
    """Both branches know nothing at high noise, so their noises agree; with the guard the same threshold costs little."""
    full, run = walked(CFG(3.0))
    assert run.evaluations == {"cond": 4 * STEPS, "uncond": 4 * STEPS}
    loose, run = walked(Adaptive(0.991, 1.0, CFG(3.0)))
    assert run.evaluations == {"cond": 4 * STEPS, "uncond": 4}
    assert off(loose, full) > 0.02
    kept, run = walked(Adaptive(0.991, float(WALK[5].u) + 1e-9, CFG(3.0)))
    assert run.evaluations["cond"] == 4 * STEPS
    assert run.evaluations["uncond"] <= 4 * 8
    assert off(kept, full) < 1e-3


@pytest.mark.parametrize("guard", [0, 3, 7])
def test_a_threshold_below_all_stops_at_the_step_behind_the_guard(guard: int) -> None:
    """NFE = steps + guard + 1: the step that decides pays for both. Steps before it are those of the inner rule to the bit."""
    rule = Adaptive(-1.0, 1.0 if guard == 0 else (float(WALK[guard].u) + float(WALK[guard - 1].u)) / 2, CFG(3.0))
    _, run = walked(rule)
    assert run.evaluations == {"cond": 4 * STEPS, "uncond": 4 * (guard + 1)}
    x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, alone = guided(run_of(4), rule), guided(run_of(4), CFG(3.0)), guided(run_of(4), CFG(1.0))
    for k, level in enumerate(WALK[:-1]):
        assert torch.equal(a(x, level).x0, (b if k <= guard else alone)(x, level).x0)


def test_a_threshold_above_one_is_the_inner_rule() -> None:
    found, run = walked(Adaptive(1.1, 1.0, CFG(3.0)))
    assert torch.equal(found, walked(CFG(3.0))[0])
    assert run.evaluations["uncond"] == 4 * STEPS


def test_each_sample_decides_for_itself_and_the_sub_batch_shrinks() -> None:
    """A batch of four is four batches of one: the same images and the same evaluations, and they differ among each other."""
    rule = Adaptive(0.99999, float(WALK[4].u), CFG(3.0))
    together, run = walked(rule, range(6))
    alone = [walked(rule, range(k, k + 1)) for k in range(6)]
    for k in range(6):
        assert torch.allclose(together[k], alone[k][0][0], rtol=1e-10, atol=1e-10)
    counts = [r.evaluations["uncond"] for _, r in alone]
    assert len(set(counts)) > 1, "the samples must differ for this test to say anything"
    assert run.evaluations["uncond"] == sum(counts)
    assert run.model.evaluations == run.evaluations


def test_the_cosine_is_that_of_the_noise() -> None:
    """In x0 or v the same threshold would decide at another level."""
    x = torch.randn(1, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    level = WALK[8]
    both = run_of(1)(x, level, ("cond", "uncond"))
    flat = [e.noise.flatten() for e in both.values()]
    cosine = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    for threshold, left in ((cosine - 1e-9, 0), (cosine + 1e-9, 1)):
        run = run_of(1)
        denoise = guided(run, Adaptive(threshold, 1.0, CFG(3.0)))
        denoise(x, level)
        denoise(x, WALK[9])
        assert run.evaluations["uncond"] == 1 + left


def test_above_the_level_of_the_decision_guidance_is_on_again() -> None:
    run, x = run_of(2), torch.zeros(2, *SHAPE).double()
    denoise = guided(run, Adaptive(-1.0, 1.0, CFG(3.0)))
    for level, asked in ((WALK[9], 2), (WALK[12], 2), (WALK[9], 2), (WALK[5], 4), (WALK[9], 4)):
        denoise(x, level)
        assert run.evaluations["uncond"] == asked


def test_a_branch_for_some_rows_is_nan_elsewhere() -> None:
    x, run = torch.ones(3, *SHAPE).double(), run_of(3)
    found = run(x, WALK[3], ("cond", "uncond"), {"uncond": [2]})
    assert torch.isnan(found["uncond"].x0[:2]).all()
    whole = run_of(3)(x, WALK[3], ("cond", "uncond"))
    assert torch.equal(found["uncond"].x0[2], whole["uncond"].x0[2])
    assert torch.equal(found["cond"].x0, whole["cond"].x0)
    assert run.evaluations == {"cond": 3, "uncond": 1}
    assert set(run(x, WALK[3], ("cond", "uncond"), {"uncond": []})) == {"cond"}
    assert run.evaluations == {"cond": 6, "uncond": 1}


@pytest.fixture(scope="module")
def fit() -> Fit:
    """LinearAG's numbers from 100 recorded images."""
    recording = Recording(3.0)
    for first in (1000, 1050):
        walked(recording, range(first, first + 50))
    return solve(recording.runs, "ddim", STEPS, 3.0)


def test_linear_ag_is_near_guidance_at_25_of_40_evaluations(fit: Fit) -> None:
    full, _ = walked(CFG(3.0), range(16))
    found, run = walked(LinearAG(fit), range(16))
    assert run.evaluations == {"cond": 16 * 20, "uncond": 16 * 5}
    alone, _ = walked(CFG(1.0), range(16))
    assert off(found, full) < 0.01 < off(alone, full)


def test_linear_ag_is_exact_for_what_is_linear_in_the_past() -> None:
    """The negative noise here is 0.7 of the positive one, 0.2 of that before and -0.1 of the negative one before."""

    def run_through(rule: Any, seed: int) -> list[Tensor]:
        generator, own, other = torch.Generator().manual_seed(seed), [], []
        found = []
        active = rule.fresh()
        for t, level in enumerate(WALK[:8]):
            p = torch.randn(2, 3, generator=generator, dtype=torch.float64)
            n = 0.7 * p + (0.2 * own[-1] - 0.1 * other[-1] if t else 0)
            own.append(p)
            other.append(n)
            x = torch.ones_like(p)
            both = {b: Estimate(EPS.x0(x, e, level), e) for b, e in (("cond", p), ("uncond", n))}
            found.append(active({b: both[b] for b in active.needs(level)}, x, level).noise)
        return found

    recording = Recording(3.0)
    for seed in range(20):
        run_through(recording, seed)
    made = solve(recording.runs, "ddim", 8, 3.0)
    plain = run_through(Recording(3.0), 99)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(run_through(LinearAG(made), 99), plain, strict=True))


def test_a_fit_is_refused_elsewhere(fit: Fit) -> None:
    rule = LinearAG(fit)
    rule.suits(Settings(sampler="ddim", steps=STEPS))
    for given in (Settings(sampler="euler", steps=STEPS), Settings(sampler="ddim", steps=10)):
        with pytest.raises(UsageError, match="the fit is of 20 steps of ddim"):
            rule.suits(given)
    x, denoise = torch.ones(1, *SHAPE).double(), guided(run_of(1), rule)
    denoise(x, WALK[0])
    with pytest.raises(UsageError, match="evaluation 2 is at u"):
        denoise(x, WALK[2])
    shifted = [Level(lv.alpha, 1.01 * lv.sigma) for lv in WALK]
    with pytest.raises(UsageError, match="the fit has other levels"):
        guided(run_of(1), rule)(x, shifted[0])


def test_a_fit_travels_in_a_file(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    fit.write(path)
    assert Fit.read(str(path)) == fit
    assert torch.equal(walked(LinearAG(str(path)))[0], walked(LinearAG(fit))[0])
    for text, words in (("[]", "does not hold an object"), ("{", "cannot be read as JSON"), ('{"steps": 1}', "needs sampler")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            LinearAG(str(path))
    with pytest.raises(UsageError, match="numbers for evaluation"):
        replace(fit, own=fit.own[:-1])
    with pytest.raises(UsageError, match="along the same levels"):
        solve([], "ddim", 1, 1.0)


def test_a_guard_outside_0_to_1_is_refused() -> None:
    with pytest.raises(UsageError, match="guard is 2"):
        Adaptive(guard=2.0)


def test_a_branch_for_some_rows_takes_their_conditions() -> None:
    x, run = torch.ones(3, *SHAPE).double(), run_of(3)
    mixed = replace(run, conds={**run.conds, "uncond": Cond(extras={"label": torch.tensor([0, 0, 1])})})
    whole, some = mixed(x, WALK[3], ("uncond",)), mixed(x, WALK[3], ("cond", "uncond"), {"uncond": [2]})
    assert torch.equal(some["uncond"].x0[2], whole["uncond"].x0[2])
    assert not torch.equal(whole["uncond"].x0[2], whole["uncond"].x0[0])
    assert Rows(("a", "b", "c"), 3, WALK[3], (3, 1, 2)).of("c") == slice(4, 6)
