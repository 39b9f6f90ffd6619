"""ReSample: the draw is a product of two Gaussians, the data are met when they should be, and the rest is latent DPS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CLEAN, Level, Noise, sample, trajectory
from ldm_pipe.restore.dps import DPS
from ldm_pipe.restore.latent import Latent
from ldm_pipe.restore.operator import Measurement, ancestral
from ldm_pipe.restore.resample import ReSample
from ldm_pipe.samplers.ddim import DDIM

HERE, THERE = Level(0.6, 0.8), Level(0.8, 0.6)


@pytest.fixture
def m(reference: Any) -> Measurement:
    found: Measurement = reference("pool2", 0.0).measurement
    return found


def test_the_draw_is_the_product_of_two_gaussians(m: Measurement, codec: Any, draw: Callable[..., Tensor]) -> None:
    """Of densities on a line: their product, normalised, has the mean and the variance of the draw. Off the circle too."""
    for here, there in ((HERE, THERE), (Level(0.3, 0.4), Level(0.5, 0.2))):
        z0, z, fresh = draw(3, 1, 1, 1).unbind()
        other = 40 * ancestral(z0, z, here, there)[1]
        line = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
        product = torch.exp(-((line - there.alpha * z0) ** 2) / (2 * there.sigma**2) - (line - z) ** 2 / (2 * other)).flatten()
        mass = product.sum()
        mean = (line * product).sum() / mass
        spread = ((line - mean) ** 2 * product).sum() / mass
        found = ReSample(m, codec, DDIM())._drawn(z0, z, here, there, lambda tag="step", fresh=fresh: fresh)
        assert float(found) == pytest.approx(float(mean + spread.sqrt() * fresh), abs=1e-6)


def test_the_variance_is_as_coded() -> None:
    """gamma (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)."""
    zero = torch.zeros(1)
    assert ancestral(zero, zero, HERE, THERE)[1] == pytest.approx(0.36 / 0.64 * (1 - 0.36 / 0.64))


def test_without_the_data_met_it_is_latent_dps_with_half_abar(
    m: Measurement, codec: Any, reference: Any, noise: Noise, draw: Callable[..., Tensor]
) -> None:
    from ldm_pipe import Gaussian

    prior, x = Gaussian(draw(5), torch.eye(5, dtype=torch.float64) + 0.5), draw(2, 5, 1, 1)
    composed = Measurement(Latent(m.operator, codec), m.y)
    for here, there in ((HERE, THERE), (THERE, CLEAN)):
        one = ReSample(m, codec, DDIM(), every=0).step(prior, x, here, there, None, noise.at(0)).x
        other = DPS(composed, DDIM(), 0.5 * here.alpha**2).step(prior, x, here, there, None, noise.at(0)).x
        assert torch.allclose(one, other, atol=1e-13)
        assert not torch.allclose(one, DDIM().step(prior, x, here, there, None, noise.at(0)).x, atol=1e-4)


@pytest.mark.parametrize(("fine", "latents"), [(0.0, False), (1.0, True)])
def test_the_data_are_met_at_every_nth_step_once_it_has_begun(
    m: Measurement, codec: Any, noise: Noise, draw: Callable[..., Tensor], fine: float, latents: bool
) -> None:
    """Where: the steps at which resampling noise is drawn. And how: z0 fits the data exactly only when fitted in latents."""
    from ldm_pipe import Gaussian

    drawn, us = [], (0.95, 0.9, 0.7, 0.6, 0.5, 0.4, 0.3)
    walk = [*(Level(1 - u, u) for u in us), CLEAN]

    class Listening:
        def at(self, index: int) -> Any:
            def draw_(tag: str = "step") -> Tensor:
                drawn.append((index, tag))
                return torch.zeros(2, 5, 1, 1, dtype=torch.float64)

            return draw_

    prior = Gaussian(draw(5), torch.eye(5, dtype=torch.float64))
    sampler = ReSample(m, codec, DDIM(), every=2, begin=0.8, fine=fine, gamma=1e12)
    steps = list(trajectory(prior, draw(2, 5, 1, 1), walk, sampler, Listening()))
    assert drawn == [(3, "resample"), (5, "resample")]  # .7, [.6], .5, [.4], .3, and not into clean
    z = steps[3].x / walk[4].alpha  # with so wide another Gaussian the draw's mean is z0
    left = float((m.operator(codec.decode(z)) - m.y).abs().max())
    assert (left < 1e-4) == latents


def test_the_wrapped_samplers_memory_goes_through(
    m: Measurement, codec: Any, noise: Noise, draw: Callable[..., Tensor]
) -> None:
    from ldm_pipe import Gaussian
    from ldm_pipe.samplers.dpm2m import DPM2M

    prior, x = Gaussian(draw(5), torch.eye(5, dtype=torch.float64)), draw(2, 5, 1, 1)
    walk, source = [Level(1 - u, u) for u in (0.9, 0.7, 0.5, 0.3)], Noise((1, 2), (5, 1, 1), dtype=torch.float64)
    one = sample(prior, x, walk, ReSample(m, codec, DPM2M(), scale=1e-30, every=0), source)
    assert torch.allclose(one, sample(prior, x, walk, DPM2M(), source), atol=1e-14)
