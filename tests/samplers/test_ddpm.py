"""DDPM: equal to diffusers' scheduler for each of its variances, also learned through a network of 2C channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from ldm_pipe import EPS, VP, Cond, Flow, Gaussian, Level, Model, Noise, UsageError, levels, sample
from ldm_pipe.analysis import ExactNetwork
from ldm_pipe.guidance.cfg import CFG
from ldm_pipe.model import Estimate, guided
from ldm_pipe.samplers.ddpm import DDPM

THEIRS = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def doubled(prior: Gaussian, path: VP) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    """A network that also gives the raw half of a learned variance, some smooth function of x in -1..1."""
    network = ExactNetwork((prior,), path, EPS)
    return lambda x, time, cond: torch.cat([network(x, time, cond), torch.tanh(x + 0.3)], dim=1)


@pytest.mark.parametrize("steps", [9, 50])
@pytest.mark.parametrize("variance", THEIRS)
def test_equals_diffusers(
    prior: Gaussian,
    noise: Noise,
    table: Callable[[Any], VP],
    close: Callable[[Tensor, Tensor, float], None],
    monkeypatch: pytest.MonkeyPatch,
    variance: Any,
    steps: int,
) -> None:
    made = DDPMScheduler(variance_type=THEIRS[variance], clip_sample=False, timestep_spacing="leading")
    path = table(made)
    made.set_timesteps(steps)
    network, cond = doubled(prior, path), Cond()
    x = noise.start()
    for i, t in enumerate(made.timesteps.tolist()):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, i=i, **k: noise.at(i)("step"))
        out = network(x, torch.tensor([t]), cond)
        x = made.step(out if variance == "learned" else out[:, :2], t, x).prev_sample
    walk = levels.leading(path, steps, offset=0)
    assert [path.time(lv) for lv in walk[:-1]] == made.timesteps.tolist()
    ours = sample(Model(network, path, EPS).bind(cond), noise.start(), walk, DDPM(variance), noise)
    close(ours, x, 1e-9)


@pytest.mark.parametrize(("raw", "same"), [(-1.0, "small"), (1.0, "large")])
def test_the_learned_variance_ends_at_the_two_bounds(
    prior: Gaussian, noise: Noise, close: Callable[[Tensor, Tensor, float], None], raw: float, same: Any
) -> None:
    def denoise(x: Tensor, level: Level) -> Estimate:
        return prior(x, level)._replace(log_var=torch.full_like(x, raw))

    walk = [Flow().rescale(lv)[1] for lv in levels.leading(VP.linear(), 6)]
    learned = sample(denoise, noise.start(), walk, DDPM("learned"), noise)
    close(learned, sample(prior, noise.start(), walk, DDPM(same), noise), 1e-12)


def test_the_learned_variance_is_halfway_between_the_logarithms(noise: Noise) -> None:
    here, there = Level(0.6, 0.8), Level(0.8, 0.6)
    zero = torch.zeros(3, 2, 2, 2, dtype=torch.float64)
    estimate = Estimate(zero, zero, zero)
    step = DDPM("learned").step(lambda x, level: estimate, zero, here, there, None, noise.at(0))
    beta = 1 - (0.6 / 0.8) ** 2
    expected = math.sqrt(beta * math.sqrt(0.6**2 / 0.8**2))
    assert torch.allclose(step.x, expected * noise.at(0)("step"), atol=1e-12)


def test_learned_needs_a_network_that_learned_it(prior: Gaussian, noise: Noise) -> None:
    with pytest.raises(UsageError, match=r"learned.*2C"):
        sample(prior, noise.start(), levels.leading(VP.linear(), 3), DDPM("learned"), noise)


def test_the_last_step_draws_nothing(prior: Gaussian, noise: Noise) -> None:
    here = Level(0.8, 0.6)
    x = noise.start()
    step = DDPM("large").step(prior, x, here, Level(2.0, 0.0), None, noise.at(0))
    assert torch.equal(step.x, 2 * prior(x, here).x0)


def test_a_learned_variance_is_split_off_before_guidance(prior: Gaussian, noise: Noise) -> None:
    """Guidance moves the noise half alone, by the same bits as without a variance; the other half is the condition's own."""
    path, other = VP.linear(), Gaussian(-prior.mean, prior.covariance)

    def of(x: Tensor, time: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        label = cond.extras["label"].reshape(-1, 1, 1, 1)
        both = (ExactNetwork((oracle,), path, EPS)(x, time, Cond()) for oracle in (prior, other))
        return torch.where(label == 1, *both), torch.tanh(x + label)

    conds = {n: Cond(extras={"label": torch.full((3,), float(k))}) for k, n in enumerate(("uncond", "cond"))}
    wide = Model(lambda x, time, cond: torch.cat(of(x, time, cond), dim=1), path, EPS)
    plain = Model(lambda x, time, cond: of(x, time, cond)[0], path, EPS)
    x, level = noise.start(), path.level(600)
    got, right = (guided(m.branches(**conds), CFG(4.0))(x, level) for m in (wide, plain))
    assert torch.equal(got.x0, right.x0)
    assert torch.equal(got.noise, right.noise)
    assert got.log_var is not None
    assert torch.equal(got.log_var, torch.tanh(x + 1))
