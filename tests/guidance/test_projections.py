"""APG, CFG-Zero*, TCFG and dynamic thresholding against diffusers' functions of the same name and against their geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, CLEAN_IMAGE, EPS, FLOW, VP, Estimate, Flow, Level, UsageError, guided
from ldm_pipe.guidance.apg import APG
from ldm_pipe.guidance.cfg_zero import CFGZero
from ldm_pipe.guidance.tcfg import TCFG, damped
from ldm_pipe.guidance.threshold import Threshold
from ldm_pipe.model import Branches
from ldm_pipe.samplewise import dot

LEVEL = Level(0.4, 0.6)


def close(a: Tensor, b: Tensor, within: float = 1e-5) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < within


def test_apg_is_that_of_diffusers_over_a_run(run: Branches, x: Tensor) -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    buffer, apg = MomentumBuffer(-0.75), guided(run, APG(6.0, 0.3, 1.5, -0.75))
    free = MomentumBuffer(-0.75)
    for t in (900, 700, 400, 100):
        level = Flow().level(t)
        both = run(x, level, ("cond", "uncond"))
        bound = normalized_guidance(both["cond"].x0, both["uncond"].x0, 5.0, buffer, 0.3, 1.5, True)
        loose = normalized_guidance(both["cond"].x0, both["uncond"].x0, 5.0, free, 0.3, 0.0, True)
        found = apg(x, level)
        assert close(found.x0, bound, 1e-12)
        assert not close(found.x0, loose, 1e-3), "the bound must matter here"
        assert torch.allclose(level.mix(found.x0, found.noise), x)


def test_apg_without_its_parts_is_cfg_and_across_leaves_the_part_along_p(estimates: dict[str, Estimate], x: Tensor) -> None:
    assert torch.allclose(APG(5.0, 1.0, 0.0, 0.0)(estimates, x, LEVEL).x0, CFG(5.0)(estimates, x, LEVEL).x0)
    p, found = estimates["cond"].x0, APG(5.0, 0.0, 0.0, 0.0)(estimates, x, LEVEL).x0
    assert torch.allclose(dot(found, p), dot(p, p))


def test_apg_bounds_the_norm_of_every_sample(estimates: dict[str, Estimate], x: Tensor) -> None:
    scaled = {n: Estimate(e.x0 * torch.tensor([0.001, 1.0, 30.0]).reshape(3, 1, 1, 1), e.noise) for n, e in estimates.items()}
    change = APG(2.0, 1.0, 1.0, 0.0)(scaled, x, LEVEL).x0 - scaled["cond"].x0
    plain = scaled["cond"].x0 - scaled["uncond"].x0
    sizes = plain.flatten(1).norm(dim=1)
    assert torch.allclose(change.flatten(1).norm(dim=1), sizes.clamp(max=1.0))
    assert sizes[0] < 1 < sizes[2]


def test_apg_forgets_where_the_noise_rises(run: Branches, x: Tensor) -> None:
    again, once = (guided(run, APG(4.0, momentum=-0.5)) for _ in range(2))
    again(x, Level(0.9, 0.1))
    assert torch.equal(again(x, LEVEL).x0, once(x, LEVEL).x0)
    assert not torch.allclose(again(x, Level(0.5, 0.5)).x0, guided(run, APG(4.0))(x, Level(0.5, 0.5)).x0)


def test_cfg_zero_is_that_of_diffusers(estimates: dict[str, Estimate], x: Tensor) -> None:
    """Its scale in fp32, over all values of a sample; the formula of the paper on the flow that both branches imply."""
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    p, n = (FLOW.target(estimates[b].x0, estimates[b].noise, LEVEL) for b in ("cond", "uncond"))
    s = cfg_zero_star_scale(p.flatten(1), n.flatten(1)).reshape(-1, 1, 1, 1)
    found = CFGZero(4.0, zero=0)(estimates, x, LEVEL)
    assert close(FLOW.target(found.x0, found.noise, LEVEL), n * s + 4 * (p - n * s))
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), x)


def test_cfg_zero_stands_still_at_the_first_levels_and_asks_for_nothing(run: Branches, x: Tensor) -> None:
    rule = guided(run, CFGZero(4.0, zero=2))
    walk = [Flow().level(t) for t in (1000, 800, 800, 500)]
    for k, level in enumerate(walk):
        found = rule(x, level)
        still = torch.equal(found.x0, found.noise)
        assert still == (k < 3), "a level that is asked twice counts once"
        assert torch.allclose(level.mix(found.x0, found.noise), x)
    assert run.evaluations == {"cond": 3, "uncond": 3}
    assert run.model.evaluations == run.evaluations


def test_tcfg_is_that_of_diffusers(estimates: dict[str, Estimate], x: Tensor) -> None:
    from diffusers.guiders.tangential_classifier_free_guidance import normalized_guidance

    p, n = estimates["cond"].noise, estimates["uncond"].noise
    found = TCFG(4.0)(estimates, x, LEVEL)
    assert close(found.noise, normalized_guidance(p, n, 3.0, True), 1e-5)
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), x)
    assert not torch.allclose(found.noise, CFG(4.0)(estimates, x, LEVEL).noise, rtol=1e-3)


def test_damping_leaves_parallel_branches_alone() -> None:
    a = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(damped(a, 2.5 * a), 2.5 * a)
    assert torch.equal(damped(0 * a, 0 * a), 0 * a)
    b = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    once = damped(a, b)
    kept = torch.linalg.matrix_rank(torch.stack([once[0].flatten(), damped(a, b)[0].flatten()]))
    assert int(kept) == 1
    assert (dot(once, once) < dot(b, b)).all()
    assert torch.allclose(dot(once, b - once), torch.zeros(2, 1, 1, 1).double(), atol=1e-12)


def test_tcfg_at_pure_noise_is_cfg(run: Branches, x: Tensor) -> None:
    level = Level(0.0, 1.0)
    assert torch.equal(guided(run, TCFG(4.0))(x, level).x0, guided(run, CFG(4.0))(x, level).x0)


@pytest.mark.parametrize("percentile", [0.6, 0.9, 0.995, 1.0])
def test_threshold_is_that_of_diffusers(percentile: float, estimates: dict[str, Estimate], x: Tensor) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9)
    x0 = CFG(6.0)(estimates, x, LEVEL).x0
    found = Threshold(percentile, 1.0, CFG(6.0))(estimates, x, LEVEL)
    assert torch.allclose(found.x0, scheduler._threshold_sample(x0))
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), x)
    wide = Threshold(percentile, 2.0, CFG(6.0))(estimates, x, LEVEL).x0
    assert torch.allclose(wide / 2, scheduler._threshold_sample(x0 / 2))


def test_threshold_leaves_samples_within_the_bound_alone(estimates: dict[str, Estimate], x: Tensor) -> None:
    sizes = torch.tensor([0.01, 1.0, 10.0]).reshape(3, 1, 1, 1)
    scaled = {n: Estimate(sizes * e.x0, e.noise) for n, e in estimates.items()}
    guided_x0, found = CFG(6.0)(scaled, x, LEVEL), Threshold(1.0, 1.0, CFG(6.0))(scaled, x, LEVEL)
    assert torch.equal(found.x0[0], guided_x0.x0[0])
    assert torch.equal(found.noise[0], guided_x0.noise[0])
    assert float(found.x0[2].abs().max()) == pytest.approx(1.0)


def test_clipping_does_not_commute_with_guidance(estimates: dict[str, Estimate], x: Tensor) -> None:
    """Clipping what the branches say before guidance is another method, which leaves values outside the bound."""
    after = Threshold(0.9, 1.0, CFG(6.0))(estimates, x, LEVEL).x0
    clipped = {n: Threshold(0.9, 1.0, CFG(1.0, n))({n: e}, x, LEVEL) for n, e in estimates.items()}
    before = CFG(6.0)(clipped, x, LEVEL).x0
    assert float(after.abs().max()) <= 1 + 1e-12
    assert float(before.abs().max()) > 1.5


SPACES = {"eps": EPS, "x0": CLEAN_IMAGE, "flow": FLOW}


def test_each_works_in_the_space_that_it_names(estimates: dict[str, Estimate], x: Tensor) -> None:
    """The same formula on the numbers of another space gives another image."""
    vp = VP.scaled_linear().level(600)
    for level in (LEVEL, vp):
        p, n = estimates["cond"].x0, estimates["uncond"].x0
        both = {"cond": Estimate(p, level.noise(x, p)), "uncond": Estimate(n, level.noise(x, n))}
        right = TCFG(4.0)(both, x, level)
        for name, space in SPACES.items():
            there = {b: space.target(e.x0, e.noise, level) for b, e in both.items()}
            other = damped(there["cond"], there["uncond"])
            out = there["cond"] + 3 * (there["cond"] - other)
            assert torch.allclose(space.x0(x, out, level), right.x0) == (name == "eps")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Threshold(0.0), "percentile above 0 to 1"),
        (lambda: Threshold(0.9, 0.0), "bound above 0"),
        (lambda: APG(bound=-1.0), "bound of 0 or more"),
        (lambda: APG(momentum=1.0), "momentum above -1"),
    ],
)
def test_fields_outside_their_ranges_are_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()
