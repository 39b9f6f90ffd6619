"""RED-diff against the loss of the paper under torch's own Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Noise, sample, trajectory
from ldm_pipe.restore.function import Function
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.restore.reddiff import REDDiff

SHAPE = (2, 2, 2)


@pytest.mark.parametrize("linear", [True, False])
def test_the_loss_of_the_paper_under_torchs_adam(
    reference: Any, grid: Any, noise: Noise, draw: Callable[..., Tensor], linear: bool
) -> None:
    """mean (y - A mu)^2 / 2 + weight (sigma / alpha) mean <eps(x) - eps, mu>, the noises held fixed, per image."""
    problem, walk = reference("pool2", 0.0), grid(12)
    m = (
        problem.measurement
        if linear
        else Measurement(Function(lambda z: z.flatten(1)[:, :5] ** 3 + z.flatten(1)[:, 3:]), draw(1, 5))
    )
    sampler = REDDiff(m, 0.25, 0.1)
    x = sampler.start(noise.start(), walk[0])
    mu = m.operator.prox(torch.zeros_like(x), 0.0, m.y).clone().requires_grad_()
    if linear:
        assert torch.allclose(mu.flatten(1), (m.y @ torch.linalg.pinv(m.operator.matrix).T).expand(3, 8))
    adam = torch.optim.Adam([mu], lr=0.1, betas=(0.9, 0.99))
    eps = noise.start()
    for done in trajectory(problem.prior, x, walk, sampler, noise):
        level = done.here
        found = problem.prior(level.mix(mu.detach(), eps), level).noise
        with torch.enable_grad():
            data = (m.y - m.operator(mu)).square().flatten(1).mean(1) / 2
            loss = data + 0.25 * level.sigma / level.alpha * ((found - eps) * mu).flatten(1).mean(1)
            adam.zero_grad()
            loss.sum().backward()
        adam.step()
        assert torch.allclose(done.memory.mu, mu.detach(), atol=1e-9)
        eps = noise.at(done.number)("step")
        assert torch.allclose(done.x, done.there.mix(mu.detach(), eps), atol=1e-9)


def test_without_the_network_it_fits_the_data(reference: Any, grid: Any, noise: Noise, draw: Callable[..., Tensor]) -> None:
    y = draw(1, *SHAPE)
    sampler = REDDiff(Measurement(Mask(torch.ones(1)), y), weight=0.0)
    end = sample(reference("pool2", 0.0).prior, sampler.start(noise.start(), grid(50)[0]), grid(50), sampler, noise)
    assert torch.equal(end, y.expand(3, *SHAPE))


@pytest.mark.parametrize(("operator", "part"), [("pool2", 0.55), ("mask4", 0.8)])
def test_it_lands_nearer_to_the_posteriors_mean(reference: Any, grid: Any, operator: str, part: float) -> None:
    """It seeks the best image, not a draw: on average nearer to the mean than A+ y, from which it starts."""
    problem, noise = reference(operator, 0.1), Noise(tuple(range(16)), SHAPE, dtype=torch.float64)
    sampler, mean = REDDiff(problem.measurement), problem.posterior.mean.reshape(1, *SHAPE)
    end = sample(problem.prior, sampler.start(noise.start(), grid(250)[0]), grid(250), sampler, noise)
    first = problem.measurement.operator.pinv(problem.measurement.y)
    assert float((end - mean).flatten(1).norm(dim=1).mean()) < part * float((first - mean).norm())
