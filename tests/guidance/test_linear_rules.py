"""Rules that are linear in the branches: the paper's sum, the same in x0, noise, v and flow."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, PREDICTIONS, Cond, Estimate, Flow, Level, Mixture, Model, UsageError, guided, sample
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.guidance.autoguidance import Autoguidance
from ldm_pipe.guidance.cfgpp import CFGPP
from ldm_pipe.guidance.compose import Compose
from ldm_pipe.guidance.curve import Curve
from ldm_pipe.guidance.noise_damped import NoiseDamped
from ldm_pipe.guidance.perp_neg import PerpNeg
from ldm_pipe.model import Branches
from ldm_pipe.noise import Noise
from ldm_pipe.samplers.ddim import DDIM

LEVEL = Level(0.4, 0.6)
NAMES = ("cond", "uncond", "a", "b")
X = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def four() -> dict[str, Estimate]:
    """Four branches that have nothing to do with each other, of one x."""
    generator = torch.Generator().manual_seed(1)
    x0 = {n: torch.randn(X.shape, dtype=torch.float64, generator=generator) for n in NAMES}
    return {n: Estimate(t, LEVEL.noise(X, t), X if n == "cond" else None) for n, t in x0.items()}


def check(found: Estimate, four: dict[str, Estimate], weights: dict[str, float]) -> None:
    """found is the weighted sum of the branches in every space."""
    for prediction in PREDICTIONS.values():
        target = {n: prediction.target(e.x0, e.noise, LEVEL) for n, e in (*four.items(), ("found", found))}
        expected = sum((w * target[n] for n, w in weights.items()), torch.zeros_like(X))
        assert torch.allclose(target["found"], expected)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (Compose(("cond", "a", "b"), (2.0, 3.0, -1.5)), {"cond": 2, "a": 3, "b": -1.5, "uncond": 1 - 3.5}),
        (Compose(("cond", "a"), (2.0,)), {"cond": 2, "a": 2, "uncond": -3}),
        (Compose(("cond", "a"), (0.25, 0.75)), {"cond": 0.25, "a": 0.75}),
        (Autoguidance(2.5, branch="a"), {"cond": 2.5, "a": -1.5}),
        (NoiseDamped(4.0, base="a"), {"a": 1, "cond": 4, "uncond": -4}),
        (NoiseDamped(4.0, base="uncond"), {"cond": 4, "uncond": -3}),
        (Curve(2.0, 7.0), {"cond": 2 + 5 * 0.4, "uncond": -1 - 5 * 0.4}),
    ],
)
def test_is_the_sum_of_the_paper_and_asks_for_what_it_takes(rule: Any, weights: dict[str, float], four: Any) -> None:
    assert set(rule.needs(LEVEL)) == set(weights)
    found = rule({n: four[n] for n in rule.needs(LEVEL)}, X, LEVEL)
    check(found, four, weights)
    assert found.log_var is X


@pytest.mark.parametrize(
    ("shape", "power", "middle", "late"),
    [
        ("linear", 1.0, 0.5, 0.8),
        ("cosine", 1.0, 0.5, (1 - math.cos(0.8 * math.pi)) / 2),
        ("cosine", 2.0, (1 - math.cos(0.25 * math.pi)) / 2, (1 - math.cos(0.64 * math.pi)) / 2),
        ("power", 3.0, 0.125, 0.512),
        ("parabola", 1.0, 1.0, 0.64),
    ],
)
def test_a_curve_goes_from_low_to_high(shape: Any, power: float, middle: float, late: float) -> None:
    """At u = 1, 0.5, 0.2 and 0, on any path; where the scale is 1 one branch is asked for."""
    curve = Curve(1.0, 5.0, shape, power)
    parts = [(curve.scale(Level(c * (1 - u), c * u)) - 1) / 4 for u in (1.0, 0.5, 0.2, 0.0) for c in (1, 2)]
    end = 0.0 if shape == "parabola" else 1.0
    assert parts[::2] == parts[1::2] == pytest.approx([0.0, middle, late, end])
    assert curve.needs(Level(0.0, 1.0)) == ("cond",)
    assert curve.needs(LEVEL) == ("cond", "uncond")


def test_a_level_curve_is_cfg(four: dict[str, Estimate]) -> None:
    for shape in ("linear", "cosine", "power", "parabola"):
        found = Curve(3.0, 3.0, shape)(four, X, LEVEL)  # type: ignore[arg-type]
        assert torch.equal(found.x0, CFG(3.0)(four, X, LEVEL).x0)


def test_composing_one_is_cfg_and_exact_posteriors_compose() -> None:
    """Liu et al. 2022: with classes that are independent given x, p(x | a, b) ~ p(x | a) p(x | b) / p(x). Of four points on a
    square a says left or right and b says up or down, so the score of a corner is the sum."""
    means = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    prior = Mixture.isotropic(torch.full((4,), 0.25), means, 0.3)
    right, up = torch.tensor([1.0, 1, 0, 0]).double(), torch.tensor([1.0, 0, 1, 0]).double()
    x, level = torch.randn(5, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), Level(0.6, 0.8)
    branches = {"uncond": prior, "right": prior.given(right), "up": prior.given(up), "corner": prior.given(right * up)}
    found = {n: m(x, level) for n, m in branches.items()}
    composed = Compose(("right", "up"), (1.0,))(found, x, level)
    assert torch.allclose(composed.x0, found["corner"].x0, atol=1e-12)  # the two axes are independent in every mixture here
    assert torch.equal(Compose(("up",), (1.0,))(found, x, level).x0, found["up"].x0)


def test_perp_neg_takes_away_only_what_lies_across(four: dict[str, Estimate]) -> None:
    rule = PerpNeg(3.0, ("a", "b"), (0.5, 2.0))
    assert set(rule.needs(LEVEL)) == {"cond", "uncond", "a", "b"}
    found, u = rule(four, X, LEVEL), four["uncond"]
    for space in (0, 1):
        d = four["cond"][space] - u[space]
        taken = (found[space] - u[space]) / 3 - d
        for k in range(len(X)):
            assert abs(float((taken[k] * d[k]).sum())) < 1e-10 * float(d[k].norm() * taken[k].norm())
            across = torch.zeros_like(d[k])
            for name, weight in (("a", 0.5), ("b", 2.0)):
                n = four[name][space][k] - u[space][k]
                across = across + weight * (n - (n * d[k]).sum() / (d[k] * d[k]).sum() * d[k])
            assert torch.allclose(taken[k], -across)
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), X)


def test_perp_neg_of_the_prompt_itself_is_cfg(four: dict[str, Estimate]) -> None:
    """Where the plain negative prompt would leave nothing: d - d = 0."""
    same = {**four, "negative": four["cond"]}
    assert torch.allclose(PerpNeg(4.0)(same, X, LEVEL).x0, CFG(4.0)(four, X, LEVEL).x0)
    assert torch.allclose(
        PerpNeg(4.0, weights=(0.0,))(four | {"negative": four["a"]}, X, LEVEL).x0, CFG(4.0)(four, X, LEVEL).x0
    )


@pytest.mark.parametrize("rule", [lambda: PerpNeg(3, ("a", "b"), (1.0, 2.0, 3.0)), lambda: Compose(("a",), (1.0, 2.0))])
def test_weights_are_one_or_one_each(rule: Any) -> None:
    with pytest.raises(UsageError, match="give one, or one each"):
        rule()


def test_cfgpp_under_ddim_is_the_update_of_the_paper() -> None:
    """Chung et al. 2024, algorithm 2: x' = alpha' (x - sigma e_w) / alpha + sigma' e_u, where e_w = e_u + w (e_c - e_u)."""
    span = torch.arange(8, dtype=torch.float64)
    prior = Mixture.isotropic(torch.tensor([0.5, 0.5]), torch.stack([span.sin(), -span.cos()]), 0.4)
    of = prior.given(torch.tensor([1.0, 0.0]).double())
    conds = {n: Cond(extras={"label": torch.full((2,), k)}) for k, n in enumerate(("uncond", "cond"))}
    run = Model(ExactNetwork((prior, of), Flow(), PREDICTIONS["v"]), Flow(), PREDICTIONS["v"]).branches(**conds)
    walk = [Flow().level(t) for t in (900, 600, 300, 100, 0)]
    noise = Noise((1, 2), (2, 2, 2), dtype=torch.float64)
    x = DDIM().start(noise.start(), walk[0])
    found = sample(guided(run, CFGPP(0.6)), x, walk, DDIM(), noise)
    for here, there in pairwise(walk):
        e_c, e_u = of(x, here).noise, prior(x, here).noise
        e_w = e_u + 0.6 * (e_c - e_u)
        x = there.alpha * (x - here.sigma * e_w) / here.alpha + there.sigma * e_u
    assert torch.allclose(found, x, rtol=1e-8, atol=1e-8)
    assert run.evaluations == {"cond": 8, "uncond": 8}


def test_cfgpp_at_scale_one_renoises_with_the_other_noise(four: dict[str, Estimate]) -> None:
    found = CFGPP(1.0)(four, X, LEVEL)
    assert torch.allclose(found.x0, four["cond"].x0)
    assert torch.equal(found.noise, four["uncond"].noise)


def _weak(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
    assert cond.tokens is not None
    return 0.5 * x + cond.tokens.reshape(-1, 1, 1, 1)


def test_another_model_answers_under_the_same_condition_and_is_counted(run: Branches, x: Tensor) -> None:
    """On its own path and by its own prediction."""
    weak = Model(_weak, Flow(), PREDICTIONS["x0"])
    found = guided(run, Autoguidance(3.0, weak))(x, LEVEL)
    p, w = run(x, LEVEL, ("cond",))["cond"], weak.bind(run.cond("cond"))(x, LEVEL)
    assert torch.allclose(found.x0, p.x0 + 2 * (p.x0 - w.x0))
    assert run.evaluations == {"cond": 6, "weak": 3}
    assert weak.evaluations["weak"] == 3
    run.evaluations.clear()
    found = guided(run, NoiseDamped(3.0, weak))(x, LEVEL)
    both, base = run(x, LEVEL, ("cond", "uncond")), weak.bind(run.cond("uncond"))(x, LEVEL)
    assert torch.allclose(found.x0, base.x0 + 3 * (both["cond"].x0 - both["uncond"].x0))
    assert run.evaluations == {"cond": 6, "uncond": 6, "base": 3}


def test_autoguidance_without_a_model_says_which_branch_is_missing(run: Branches, x: Tensor) -> None:
    with pytest.raises(UsageError, match="needs a branch 'weak'"):
        guided(run, Autoguidance(2.0))(x, LEVEL)
