"""The adaptive ODE: the exact flow to its tolerance, on every path, with fewer evaluations where less is asked."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ldm_pipe import CLEAN, VP, Flow, Gaussian, Level, Noise, NumericalError, UsageError, sample
from ldm_pipe.model import Estimate
from ldm_pipe.runge_kutta import integrate
from ldm_pipe.samplers.ode import ODE


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("walk", [[Level(0.0, 1.0), Level(0.9, 0.1)], [VP.linear().level(t) for t in (999, 700, 20)]])
def test_it_is_the_exact_flow(prior: Gaussian, noise: Noise, walk: list[Level], tolerance: float) -> None:
    x = noise.start()
    end = sample(prior, x, walk, ODE(tolerance), noise)
    assert float((end - prior.flow(x, walk[0], walk[-1])).abs().max()) < 10 * tolerance


def test_one_step_is_enough(prior: Gaussian, noise: Noise) -> None:
    """From pure noise to clean: x0 at the level where the ODE ends, whatever stops are made on the way."""
    x, low = noise.start(), Level(0.99, 0.01)
    right = prior(prior.flow(x, Level(0.0, 1.0), low), low).x0
    for between in ([], [0.6, 0.3], [0.005]):
        walk = [Level(0.0, 1.0), *(Flow().level(1000 * u) for u in between), CLEAN]
        end = sample(prior, x, walk, ODE(1e-8), noise)
        assert float((end - right).abs().max()) < (1e-3 if 0.005 in between else 1e-6)


def test_fewer_evaluations_where_less_is_asked(prior: Gaussian, noise: Noise) -> None:
    def count(tolerance: float) -> int:
        asked: list[float] = []

        def denoise(x: Tensor, level: Level) -> Estimate:
            asked.append(float(level.u))
            return prior(x, level)

        sample(denoise, noise.start(), [Level(0.0, 1.0), CLEAN], ODE(tolerance), noise)
        assert (asked[0], asked[-1]) == (1.0, 0.01)
        assert min(asked) == 0.01
        assert len(asked) % 6 == 2  # one, six for every try, and the last
        return len(asked)

    assert count(1e-2) < count(1e-4) < count(1e-7)


def test_the_pair_of_formulae_is_scipys() -> None:
    """Of a fixed first step the fifth-order result, and of a whole run the same number of digits, forwards and backwards."""

    def f(t: float, y: Tensor) -> Tensor:
        return torch.stack([-y[:, 1], y[:, 0]], dim=1) * (1 + 0.3 * math.sin(3 * t))

    y = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    once = {"first_step": 0.4, "rtol": 1, "atol": 1}
    theirs = solve_ivp(lambda t, v: f(t, torch.tensor(v)[None])[0].numpy(), (0, 0.4), y[0].numpy(), **once)
    assert integrate(f, y, 0.0, 0.4, 1.0)[0].tolist() == pytest.approx(theirs.y[:, -1].tolist(), abs=1e-14)
    far = integrate(f, y, 0.0, 20.0, 1e-9)
    assert float(far.norm()) == pytest.approx(float(y.norm()), abs=1e-6)
    assert integrate(f, far, 20.0, 0.0, 1e-9)[0].tolist() == pytest.approx([1.0, 0.5], abs=1e-6)


def test_what_cannot_be_solved_says_so() -> None:
    with pytest.raises(NumericalError, match="could not be solved to 1e-05"):
        integrate(lambda t, y: y * math.nan, torch.ones(1, 2), 0.0, 1.0)


@pytest.mark.parametrize("fields", [{"tolerance": 0.0}, {"tolerance": 2.0}, {"least": 0.0}, {"least": 1.0}])
def test_fields_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="ode"):
        ODE(**fields)
