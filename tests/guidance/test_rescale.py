"""CFG rescale: nothing at phi 0, the positive branch's deviation at phi 1, in the space named, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, CLEAN_IMAGE, EPS, VELOCITY, Estimate, Level, Rescale
from ldm_pipe.model import Rule

LEVEL = Level(0.4, 0.6)
SPACES: dict[Any, Any] = {"x0": CLEAN_IMAGE, "eps": EPS, "v": VELOCITY}
every = pytest.mark.parametrize("space", SPACES)


@every
@pytest.mark.parametrize("inner", [CFG(4.0), CFG(1.0)])
def test_phi_zero_changes_no_bit(space: Any, inner: Rule, estimates: dict[str, Estimate], x: Tensor) -> None:
    found, plain = Rescale(0.0, inner, space)(estimates, x, LEVEL), inner(estimates, x, LEVEL)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_is_the_formula_of_the_paper(space: Any, phi: float, estimates: dict[str, Estimate], x: Tensor) -> None:
    """Lin et al. 2023, eq. 15 and 16: phi * out * std(pos) / std(out) + (1 - phi) * out, std per sample."""
    found, guided = Rescale(phi, CFG(5), space)(estimates, x, LEVEL), CFG(5)(estimates, x, LEVEL)
    p, out, result = (SPACES[space].target(e.x0, e.noise, LEVEL) for e in (estimates["cond"], guided, found))
    for k in range(len(x)):
        assert torch.allclose(result[k], phi * out[k] * p[k].std() / out[k].std() + (1 - phi) * out[k])
    assert torch.allclose(LEVEL.mix(found.x0, found.noise), x)
    assert found.log_var is estimates["cond"].log_var


def test_the_usual_space_is_v_and_the_spaces_differ(estimates: dict[str, Estimate], x: Tensor) -> None:
    found = {s: Rescale(0.7, CFG(5), s)(estimates, x, LEVEL).x0 for s in SPACES}
    assert torch.equal(Rescale(0.7, CFG(5))(estimates, x, LEVEL).x0, found["v"])
    assert not any(torch.allclose(found["v"], found[s], atol=1e-3) for s in ("x0", "eps"))


@every
def test_does_not_depend_on_the_path(space: Any, estimates: dict[str, Estimate], x: Tensor) -> None:
    here = Rescale(0.7, CFG(5), space)(estimates, x, LEVEL)
    there = Rescale(0.7, CFG(5), space)(estimates, 2.5 * x, Level(2.5 * LEVEL.alpha, 2.5 * LEVEL.sigma))
    assert torch.allclose(here.x0, there.x0)
    assert torch.allclose(here.noise, there.noise)


def test_an_image_does_not_depend_on_its_batch(estimates: dict[str, Estimate], x: Tensor) -> None:
    alone = {n: Estimate(e.x0[1:2], e.noise[1:2]) for n, e in estimates.items()}
    assert torch.allclose(Rescale()(alone, x[1:2], LEVEL).x0[0], Rescale()(estimates, x, LEVEL).x0[1])


def test_needs_the_positive_branch_once() -> None:
    assert Rescale(0.7, CFG(5)).needs(LEVEL) == ("cond", "uncond")
    assert Rescale(0.7, CFG(1)).needs(LEVEL) == ("cond",)
    assert set(Rescale(0.7, CFG(5, "a", "b")).needs(LEVEL)) == {"a", "b", "cond"}
