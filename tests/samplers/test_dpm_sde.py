"""DPM-Solver++ SDE: k-diffusion's rule in its own coordinates, DPM-Solver++(2S) at eta 0, one Brownian path for both stages."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldm_pipe import CLEAN, VP, Gaussian, Level, Noise, levels, sample
from ldm_pipe.samplers.dpm2s import DPM2S
from ldm_pipe.samplers.dpm_sde import DPMSDE
from ldm_pipe.samplers.euler_ancestral import EulerAncestral

Close = Callable[[Tensor, Tensor, float], None]


def test_eta_zero_is_2s(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.scaled_linear(), 9)
    close(*(sample(prior, noise.start(), walk, s, noise) for s in (DPMSDE(0.0), DPM2S())), 1e-12)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_a_step_in_variance_exploding_coordinates(prior: Gaussian, noise: Noise, close: Close, eta: float) -> None:
    """Two ancestral stages: y' = (down / s) y + (1 - down / s) x0 + up z, with the increments of one Brownian path over s."""
    here, there, x = Level(0.4, 0.8), Level(0.9, 0.5), noise.start()
    s, t = here.ratio, there.ratio
    m, y = math.sqrt(s * t), x / here.alpha

    def ancestral(low: float) -> tuple[float, float]:
        up = min(low, eta * math.sqrt(low**2 * (s**2 - low**2) / s**2))
        return math.sqrt(low**2 - up**2), up

    # The path's increments over s..m and m..t; the second's draw is what is left of the whole step's.
    whole, other = noise.at(3)("step"), noise.at(3)("middle")
    share = (s - m) / (s - t)
    middle = math.sqrt(share) * whole + math.sqrt(1 - share) * other
    x0 = prior(y, Level(1.0, s)).x0
    down, up = ancestral(m)
    second = prior(down / s * y + (1 - down / s) * x0 + up * middle, Level(1.0, m)).x0
    down, up = ancestral(t)
    expected = down / s * y + (1 - down / s) * second + up * whole
    close(DPMSDE(eta).step(prior, x, here, there, None, noise.at(3)).x / 0.9, expected, 1e-12)


@pytest.mark.parametrize(("here", "there"), [(Level(0.0, 1.0), Level(0.4, 0.6)), (Level(0.4, 0.6), CLEAN)])
def test_end_points_are_euler_ancestrals(prior: Gaussian, noise: Noise, here: Level, there: Level) -> None:
    ours, euler = (s.step(prior, noise.start(), here, there, None, noise.at(1)).x for s in (DPMSDE(0.7), EulerAncestral(0.7)))
    assert torch.allclose(ours, euler, atol=1e-12)
