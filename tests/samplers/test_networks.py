"""Every sampler on a U-Net and on a transformer with random weights, for networks of noise, velocity and flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm_pipe import EPS, FLOW, VELOCITY, VP, Cond, Flow, Model, Noise, build, levels, registry
from ldm_pipe.walk import sample

KINDS = {"eps": (VP.linear(), EPS), "v": (VP.linear(), VELOCITY), "flow": (Flow(), FLOW)}


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("network", ["unet", "pixart"])
@pytest.mark.parametrize("name", sorted(registry.KINDS["sampler"]))
def test_it_runs_and_hears_the_condition(diffusers_model: Callable[[str], Any], name: str, network: str, kind: str) -> None:
    """Finite, the same again, and another image under another condition."""
    path, prediction = KINDS[kind]
    model, sampler = Model(diffusers_model(network).network, path, prediction), build("sampler", name)
    walk = sampler.walk(levels.trailing(path, 4)[1:])  # below pure noise, where an eps network knows nothing
    noise = Noise((3, 4), (4, 8, 8))
    tokens = torch.randn(2, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    first, again, other = (
        sample(model.bind(Cond(tokens=t, mask=mask)), sampler.start(noise.start(), walk[0]), walk, sampler, noise)
        for t in (tokens[0], tokens[0], tokens[1])
    )
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
