"""DDRM's kernel: DDIM at eta 0, all noise fresh at eta 1, the right variance between."""

from __future__ import annotations

import pytest
import torch

from ldm_pipe import VP, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.renoise import Renoise


def test_eta_zero_is_ddim(prior: Gaussian, noise: Noise) -> None:
    walk = levels.leading(VP.linear(), 12)
    assert torch.equal(*(sample(prior, noise.start(), walk, s, noise) for s in (Renoise(0.0), DDIM(0.0))))


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_keeps_a_part_of_the_noise_and_draws_the_rest(prior: Gaussian, noise: Noise, eta: float) -> None:
    """Kawar et al. 2022, eq. 7: sigma_s (sqrt(1 - eta^2) eps + eta z); this eta is not DDIM's."""
    here, there, x = Level(0.6, 0.8), Level(0.7, 0.3), noise.start()
    x0, eps, _ = prior(x, here)
    step = Renoise(eta).step(prior, x, here, there, None, noise.at(3))
    expected = 0.7 * x0 + 0.3 * ((1 - eta**2) ** 0.5 * eps + eta * noise.at(3)("step"))
    assert torch.allclose(step.x, expected, atol=1e-12)


def test_the_step_into_clean_is_x0(prior: Gaussian, noise: Noise) -> None:
    x, here = noise.start(), Level(0.6, 0.8)
    assert torch.equal(Renoise(1.0).step(prior, x, here, Level(1.0, 0.0), None, noise.at(0)).x, prior(x, here).x0)
