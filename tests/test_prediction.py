"""eps, v, x0 and flow: reading an output and making one are inverse, on the circle and off it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe import CLEAN_IMAGE, EPS, FLOW, PREDICTIONS, VELOCITY, Level, UsageError

X0, NOISE = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
part = st.floats(0.02, 3.0)
every = pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS.keys())


@every
@settings(deadline=None, max_examples=50)
@given(alpha=part, sigma=part)
def test_target_and_reading_are_inverse(prediction: Any, alpha: float, sigma: float) -> None:
    level = Level(alpha, sigma)
    x, out = level.mix(X0, NOISE), prediction.target(X0, NOISE, level)
    assert torch.allclose(prediction.x0(x, out, level), X0, atol=1e-10)
    assert torch.allclose(prediction.noise(x, out, level), NOISE, atol=1e-10)


@every
@settings(deadline=None, max_examples=50)
@given(alpha=part, sigma=part)
def test_any_output_splits_x(prediction: Any, alpha: float, sigma: float) -> None:
    """Whatever the network says, alpha x0 + sigma noise is x, and the target of what was read is the output."""
    level, x, out = Level(alpha, sigma), X0, 2 * NOISE + 0.3
    x0, noise = prediction.x0(x, out, level), prediction.noise(x, out, level)
    assert torch.allclose(level.mix(x0, noise), x, atol=1e-9)
    assert torch.allclose(prediction.target(x0, noise, level), out, atol=1e-9)


def test_what_each_one_predicts() -> None:
    level = Level(0.6, 0.8)
    assert torch.equal(EPS.target(X0, NOISE, level), NOISE)
    assert torch.equal(CLEAN_IMAGE.target(X0, NOISE, level), X0)
    assert torch.equal(FLOW.target(X0, NOISE, level), NOISE - X0)
    assert torch.allclose(VELOCITY.target(X0, NOISE, level), 0.6 * NOISE - 0.8 * X0)
    assert set(PREDICTIONS) == {"eps", "v", "x0", "flow"}


@pytest.mark.parametrize("prediction", [VELOCITY, CLEAN_IMAGE, FLOW])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_pure_noise_can_be_read(prediction: Any, scale: float) -> None:
    level = Level(0.0, scale)
    x, out = level.mix(X0, NOISE), prediction.target(X0, NOISE, level)
    assert torch.allclose(prediction.x0(x, out, level), X0)
    assert torch.allclose(prediction.noise(x, out, level), NOISE)


def test_eps_refuses_pure_noise_by_name() -> None:
    with pytest.raises(UsageError, match=r"eps.*alpha = 0"):
        EPS.x0(X0, NOISE, Level(0.0, 1.0))


@every
def test_a_clean_image_can_be_read(prediction: Any) -> None:
    level = Level(2.0, 0.0)
    out = prediction.target(X0, NOISE, level)
    assert torch.allclose(prediction.x0(2 * X0, out, level), X0)
    noise = prediction.noise(2 * X0, out, level)
    assert torch.allclose(noise, torch.zeros_like(X0) if prediction is CLEAN_IMAGE else NOISE)


@every
def test_training_levels_are_tensors(prediction: Any) -> None:
    level = Level(*(torch.tensor(v, dtype=torch.float64)[:, None, None, None] for v in ([0.6, 0.9], [0.8, 0.3])))
    x, out = level.mix(X0, NOISE), prediction.target(X0, NOISE, level)
    assert torch.allclose(prediction.x0(x, out, level), X0)
    row = Level(0.9, 0.3)
    assert torch.allclose(out[1], prediction.target(X0[1], NOISE[1], row))
