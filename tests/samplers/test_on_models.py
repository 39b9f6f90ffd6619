"""Every sampler through a whole (tiny, random) latent diffusion model: on networks of noise, of v to alpha = 0, of flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm_pipe import registry
from ldm_pipe.pipeline import Pipeline


@pytest.fixture(scope="module", params=["eps", "v", "flow"])
def pipe(tiny: Callable[[str], Path], request: pytest.FixtureRequest) -> Pipeline:
    return Pipeline.from_pretrained(str(tiny(request.param)), "cpu", "fp32")


@pytest.mark.parametrize("name", registry.KINDS["sampler"])
def test_it_runs_under_guidance(pipe: Pipeline, name: str) -> None:
    """Finite, another image for another seed, both branches asked as often; the walk begins at the path's end."""
    fields = {"sampler_set": {"tolerance": "0.05"}} if name == "ode" else {}
    made = pipe("a fox", seed=1, sampler=name, spacing="trailing", steps=3, guidance_scale=2.0, num_images=2, **fields)
    assert torch.isfinite(made.latents).all()
    assert not torch.equal(*made.latents)
    assert made.evaluations["cond"] == made.evaluations["uncond"] >= 6
