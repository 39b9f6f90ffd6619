"""Score SDE: diffusers' VE scheduler, the official VP formulas, moments that converge, Langevin's formula and fixed point."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from diffusers.schedulers import scheduling_sde_ve
from torch import Tensor

from ldm_pipe import EDM, VP, Gaussian, Level, Noise, UsageError, levels, sample
from ldm_pipe.analysis import read_walk
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.euler_ancestral import EulerAncestral
from ldm_pipe.samplers.score_sde import ScoreSDE

Close = Callable[[Tensor, Tensor, float], None]


def test_the_ve_corrector_and_predictor_equal_diffusers(
    prior: Gaussian, noise: Noise, close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image, so that its mean of norms over a batch is ours. Its predictor is the reverse diffusion."""
    made = ScoreSdeVeScheduler(num_train_timesteps=20, snr=0.16, sigma_max=50.0)
    made.set_timesteps(20)
    made.set_sigmas(20)
    one, draws = noise.take([0]), iter(())
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *a, **k: next(draws))
    sigmas = made.discrete_sigmas.double().flip(0).tolist()
    x = 3 * one.start()
    for i in range(12):
        here, there = Level(1.0, sigmas[i]), Level(1.0, sigmas[i + 1])
        ours = ScoreSDE("ve").step(prior, x, here, there, None, one.at(i)).x
        draws = iter((one.at(i)("step"), one.at(i)("correct 0")))
        t = made.timesteps[i].double()
        theirs = made.step_pred(-prior(x, here).noise / here.sigma, t, x).prev_sample
        score = -prior(theirs, there).noise / there.sigma
        x = made.step_correct(score, theirs).prev_sample
        close(ours, x, 1e-5)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_a_vp_step_is_the_official_formula(prior: Gaussian, noise: Noise, close: Close, predictor: Any) -> None:
    """Song et al. 2020, appendices E and F, with beta = 1 - r^2 of the step; Euler-Maruyama with the integral of beta."""
    here, there, x = VP.linear().level(600), VP.linear().level(560), noise.start()
    beta = 1 - (here.alpha / there.alpha) ** 2
    score, z = prior.score(x, here), noise.at(3)("step")
    if predictor == "reverse_diffusion":
        right = (2 - (1 - beta) ** 0.5) * x + beta * score + beta**0.5 * z
    elif predictor == "ancestral":
        right = (x + beta * score) / (1 - beta) ** 0.5 + beta**0.5 * z
    else:
        span = -math.log(1 - beta)
        right = x + span * (x / 2 + score) + span**0.5 * z
    close(ScoreSDE("vp", predictor, 0).step(prior, x, here, there, None, noise.at(3)).x, right, 1e-12)


def test_a_sub_vp_step_is_euler_maruyamas(prior: Gaussian, noise: Noise, close: Close) -> None:
    """Eq. 29: alpha = exp(-B / 2), sigma = 1 - alpha^2, drift -beta x / 2, g^2 = beta (1 - e^-2B); the clock is B."""
    a, b = math.exp(-1.3), math.exp(-1.0)
    here, there, x = Level(a, 1 - a * a), Level(b, 1 - b * b), noise.start()
    right = x + 0.6 * (x / 2 + (1 - a**4) * prior.score(x, here)) + (0.6 * (1 - a**4)) ** 0.5 * noise.at(3)("step")
    close(ScoreSDE("sub_vp", "euler_maruyama", 0).step(prior, x, here, there, None, noise.at(3)).x, right, 1e-12)
    r = a / b
    g = (1 - a * a) ** 2 - (r * (1 - b * b)) ** 2
    right = (2 - r) * x + g * prior.score(x, here) + g**0.5 * noise.at(3)("step")
    close(ScoreSDE("sub_vp", corrections=0).step(prior, x, here, there, None, noise.at(3)).x, right, 1e-12)


def test_ancestral_is_ddpm_and_euler_ancestral(prior: Gaussian, noise: Noise, close: Close) -> None:
    walk = levels.trailing(VP.linear().zero_terminal(), 8)
    for ours, other in ((ScoreSDE("vp", "ancestral", 0), DDPM("large")), (ScoreSDE("ve", "ancestral", 0), EulerAncestral())):
        part = walk if isinstance(other, DDPM) else walk[1:]
        close(*(sample(prior, noise.start(), part, s, noise) for s in (ours, other)), 1e-9)


@pytest.mark.parametrize("sde", ["vp", "ve", "sub_vp"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_the_moments_converge_with_first_order(prior: Gaussian, sde: Any, predictor: Any) -> None:
    """The mean and the covariance at u = .1 from the marginal at u = .98, in even steps of log(sigma / alpha)."""
    if (sde, predictor) == ("sub_vp", "ancestral"):
        return
    errors = []
    for count in (100, 200):
        ends = [math.log(u / (1 - u)) for u in (0.98, 0.1)]
        walk = [EDM().level((ends[0] + (ends[1] - ends[0]) * k / count) / 4) for k in range(count + 1)]
        start, end = walk[0], walk[-1]
        map_ = read_walk(prior, walk, ScoreSDE(sde, predictor, 0), (2, 2, 2))
        mean, covariance = map_.carry(start.alpha * prior.mean, prior.covariance + start.sigma**2 * torch.eye(8).double())
        assert float((mean - prior.mean).abs().max()) < 0.2
        errors.append(float((covariance - prior.covariance - end.sigma**2 * torch.eye(8)).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("sde", "rate"), [("ve", 1.0), ("vp", None)])
def test_langevin_is_its_formula_for_each_image(
    prior: Gaussian, noise: Noise, close: Close, sde: Any, rate: float | None
) -> None:
    here, there, x = VP.linear().level(600), VP.linear().level(560), noise.start()
    middle = ScoreSDE(sde, corrections=0).step(prior, x, here, there, None, noise.at(3)).x
    score, z = prior.score(middle, there), noise.at(3)("correct 0")
    a = rate or (here.alpha / there.alpha) ** 2
    rows = []
    for k in range(3):
        e = 2 * a * (0.2 * float(z[k].norm() / score[k].norm())) ** 2
        rows.append(middle[k] + e * score[k] + (2 * e) ** 0.5 * z[k])
    close(ScoreSDE(sde, snr=0.2).step(prior, x, here, there, None, noise.at(3)).x, torch.stack(rows), 1e-10)


def test_langevin_pulls_towards_the_marginal() -> None:
    """Images of the wrong variance come to the right one, but for the finite step (1 / (1 - e / 2)) that knows |z|."""
    prior = Gaussian.isotropic(torch.zeros(64, dtype=torch.float64), 1.0)
    level, noise = Level(0.6, 0.8), Noise(tuple(range(200)), (1, 8, 8), dtype=torch.float64)
    x = 1.3 * noise.start()
    after = ScoreSDE(corrections=100).step(prior, x, level, level, None, noise.at(0)).x
    assert float(after.std()) == pytest.approx(1.03, abs=0.03)


def test_a_corrector_without_signal_changes_nothing(prior: Gaussian, noise: Noise) -> None:
    walk = levels.trailing(VP.linear(), 6)
    ends = [sample(prior, noise.start(), walk, ScoreSDE(corrections=k, snr=0.0), noise) for k in (0, 2)]
    assert torch.equal(*ends)


def test_the_start_is_the_priors_of_its_sde(noise: Noise) -> None:
    z, level = noise.start(), Level(0.1, 0.5)
    assert torch.allclose(ScoreSDE("vp").start(z, level), z * math.hypot(0.1, 0.5))
    assert torch.equal(ScoreSDE("ve").start(z, level), z * 0.5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sde": "sub_vp", "predictor": "ancestral"}, "no ancestral predictor"),
        ({"corrections": -1}, "corrections is 0 to 100"),
        ({"snr": math.nan}, "snr 0 to 10"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ScoreSDE(**fields)


def test_calls_are_one_and_the_corrections() -> None:
    assert [ScoreSDE(corrections=k).calls for k in (0, 1, 3)] == [1, 2, 4]
