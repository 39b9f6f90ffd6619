"""On Gaussian data the least of every objective is the exact denoiser, found in closed form; what else a field promises."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm_pipe.cond import Cond
from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level, Path
from ldm_pipe.model import Model
from ldm_pipe.path import EDM, VP, Flow
from ldm_pipe.prediction import EPS, FLOW, PREDICTIONS, VELOCITY
from train.objectives.hybrid import bound
from train.objectives.objective import Objective, Terms, read
from train.objectives.repa import Alignment
from train.objectives.uncertainty import LogVariance
from train.objectives.weights import WEIGHTS

PATHS: dict[str, Path] = {"table": VP.scaled_linear(), "flow": Flow(), "edm": EDM()}
DEVIATION, COUNT, SHAPE = 0.7, 4000, (1, 2, 2)


def draws(objective: Objective, count: int = COUNT, normal: float | None = None) -> dict[str, Tensor]:
    rng = np.random.default_rng(5)
    rows = [objective.draw(rng, SHAPE) for _ in range(count)]
    found = {name: torch.from_numpy(np.stack([r[name] for r in rows])).double() for name in rows[0]}
    return found if normal is None else found | {"normal": torch.full((count,), normal, dtype=torch.float64)}


def data(count: int = COUNT) -> Tensor:
    return DEVIATION * torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scaled(factor: float) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    return lambda x, time, cond: factor * x


def best_factor(objective: Objective, path: Path, prediction: str, normal: float) -> float:
    """The factor of the linear network out = factor * x with the least loss: the bottom of a parabola."""
    x0, drawn = data(), draws(objective, normal=normal)

    def loss(factor: float) -> float:
        model = Model(scaled(factor), path, PREDICTIONS[prediction])
        return float(objective(model, x0, drawn, Cond()).loss.mean())

    low, middle, high = loss(-1.0), loss(0.0), loss(1.0)
    return (low - high) / (2 * (low - 2 * middle + high))


@pytest.mark.parametrize("normal", [-0.7, 0.0, 1.0])
@pytest.mark.parametrize("weight", ["constant", "min_snr"])
@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("where", sorted(PATHS))
def test_the_least_loss_is_the_exact_denoiser(where: str, prediction: str, weight: str, normal: float) -> None:
    path, objective = PATHS[where], read({"weight": weight})
    model = Model(scaled(best_factor(objective, path, prediction, normal)), path, PREDICTIONS[prediction])
    level = objective.levels(torch.tensor([normal], dtype=torch.float64), path)
    x = torch.ones(1, *SHAPE, dtype=torch.float64)
    a, s = float(level.alpha), float(level.sigma)
    exact = a * DEVIATION**2 / (a * a * DEVIATION**2 + s * s)  # E[x0 | x] = exact * x
    assert model(x, level, Cond()).x0.mean().item() == pytest.approx(exact, rel=0.03, abs=0.005)


def loss_of(objective: Objective, network: Callable[..., Tensor], **more: Tensor) -> Terms:
    model = Model(network, Flow(), FLOW)
    return objective(model, data(8), draws(objective, 8), Cond(), **more)


def test_no_field_changes_nothing() -> None:
    plain, written = loss_of(Objective(), scaled(0.3)), loss_of(Objective(offset=0.0, huber=0.0), scaled(0.3))
    assert torch.equal(plain.loss, written.loss)
    assert torch.equal(plain.loss, plain.error)


def test_huber_is_the_square_for_small_errors_and_a_line_for_large_ones() -> None:
    square = loss_of(Objective(), scaled(0.3)).loss
    assert torch.allclose(loss_of(Objective(huber=1e4), scaled(0.3)).loss, square, rtol=1e-5)
    small = loss_of(Objective(huber=1e-4), scaled(0.3)).loss
    absolute = loss_of(Objective(huber=2e-4), scaled(0.3)).loss
    assert torch.allclose(absolute, 2 * small, rtol=1e-2)


def test_offset_noise_is_one_value_per_channel_in_input_and_target() -> None:
    objective = Objective(offset=0.5)
    drawn, seen = draws(objective, 3), []
    zero = torch.zeros(3, *SHAPE, dtype=torch.float64)

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return x

    terms = objective(Model(network, Flow(), FLOW), zero, drawn, Cond())
    u = terms.u[:, None, None, None]
    noise = drawn["noise"] + 0.5 * drawn["offset"]
    assert torch.allclose(seen[0], u * noise)
    assert torch.allclose(terms.loss, ((u - 1) * noise).square().mean(dim=(1, 2, 3)))


def test_perturbation_moves_the_input_and_not_the_target() -> None:
    objective, seen = Objective(perturb=0.1), []
    drawn = draws(objective, 3)

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        seen.append(x)
        return x * 0

    terms = objective(Model(network, Flow(), FLOW), torch.zeros(3, *SHAPE, dtype=torch.float64), drawn, Cond())
    u = terms.u[:, None, None, None]
    assert torch.allclose(seen[0], u * (drawn["noise"] + 0.1 * drawn["perturb"]))
    assert torch.allclose(terms.loss, drawn["noise"].square().mean(dim=(1, 2, 3)))


def test_what_the_mask_hides_has_no_loss() -> None:
    mask = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64).expand(8, 1, 2, 2)
    whole, left, right = (loss_of(Objective(), scaled(0.3), mask=m).loss for m in (mask * 0 + 1, mask, 1 - mask))
    assert torch.allclose(left + right, whole)
    assert torch.equal(whole, loss_of(Objective(), scaled(0.3)).loss)


def test_draws_depend_on_nothing_but_the_generator() -> None:
    first, second = (Objective(offset=1, perturb=1).draw(np.random.default_rng(3), SHAPE) for _ in range(2))
    assert all(np.array_equal(first[k], second[k]) for k in first)
    fewer = Objective().draw(np.random.default_rng(3), SHAPE)
    assert all(np.array_equal(fewer[k], first[k]) for k in fewer)


def test_an_eps_network_is_not_trained_at_zero_snr() -> None:
    zero = VP.scaled_linear().zero_terminal()
    with pytest.raises(UsageError, match="zero SNR"):
        Objective().check(Model(scaled(1), zero, EPS))
    Objective().check(Model(scaled(1), zero, VELOCITY))


@pytest.mark.parametrize("weight", sorted(WEIGHTS))
def test_weights_are_finite_at_zero_terminal_snr(weight: str) -> None:
    path = VP.scaled_linear().zero_terminal()
    objective = read({"levels": "uniform", "weight": weight})
    x0, drawn = data(64), draws(objective, 64)
    drawn["normal"][:32] = 9.0  # the last entry
    assert torch.isfinite(objective(Model(scaled(0.2), path, VELOCITY), x0, drawn, Cond()).loss).all()


def test_the_learned_weight_finds_the_loss_of_every_level() -> None:
    """L / e^u + u is least at e^u = L, here 2 on the noisy and 0.1 on the clean levels."""
    torch.manual_seed(0)
    net = LogVariance()
    snr = torch.logspace(-3, 3, 64)
    loss = torch.where(snr < 1, 2.0, 0.1)
    assert torch.equal(net(loss, snr), loss)  # u is zero at first
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(400):
        optimiser.zero_grad()
        net(loss, snr).mean().backward()
        optimiser.step()
    far = (snr < 0.1) | (snr > 10)
    assert torch.allclose(net.of(snr)[far].exp(), loss[far], rtol=0.3)
    with torch.no_grad():
        assert net(loss, snr).mean() < loss.mean()


TABLE = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 20, dtype=torch.float64), 0)


def steps(time: int, part: float, guess: float = 0.0) -> tuple[Tensor, Tensor]:
    """The bound and its gradient with respect to the guess, at one step, from exact x0 plus `guess`."""
    x0 = data(6)
    level = Level(float(TABLE[time].sqrt()), float((1 - TABLE[time]).sqrt()))
    x = level.mix(x0, torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    guessed = (x0 + guess).requires_grad_()
    raw = torch.full_like(x0, part).requires_grad_()
    found = bound(TABLE, torch.full((6,), time), x, x0, guessed, raw)
    found.sum().backward()
    assert guessed.grad is None  # only the variance is taught
    return found.detach(), raw.grad


def test_the_bound_is_zero_for_the_true_posterior() -> None:
    for time in (1, 7, 19):
        found, _ = steps(time, -1.0)
        assert found.abs().max() < 1e-10


def test_the_bound_agrees_with_the_divergence_of_gaussians() -> None:
    time, part, guess = 7, 0.3, 0.4
    before, now = TABLE[time - 1], TABLE[time]
    beta = 1 - now / before
    small = (1 - before) / (1 - now) * beta
    var = torch.exp((1 + part) / 2 * beta.log() + (1 - part) / 2 * small.log())
    shift = before.sqrt() * beta / (1 - now) * guess
    q, p = torch.distributions.Normal(shift * 0, small.sqrt()), torch.distributions.Normal(shift, var.sqrt())
    expected = torch.distributions.kl_divergence(q, p) / np.log(2)
    assert torch.allclose(steps(time, part, guess)[0], expected)


def test_a_wrong_guess_asks_for_more_variance() -> None:
    assert (steps(7, 0.0, guess=3.0)[1] < 0).all()  # a step down the gradient raises the variance
    assert (steps(7, 0.0)[1] > 0).all()


def test_the_first_step_is_a_density() -> None:
    found, _ = steps(0, -1.0)
    beta = 1 - TABLE[0]
    tilde = (1 - TABLE[0]) / (1 - TABLE[1]) * (1 - TABLE[1] / TABLE[0])
    assert beta > 0
    assert found.mean().item() == pytest.approx(0.5 * np.log2(2 * np.pi * float(tilde)), rel=1e-6)


def test_hybrid_adds_the_bound_of_all_steps() -> None:
    path = VP(tuple(TABLE.tolist()))

    def network(x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return torch.cat([0.3 * x, 0.1 * x], 1)

    plain, both = (
        o(Model(network, path, EPS), data(8), draws(o, 8), Cond()).loss
        for o in (read({"levels": "uniform"}), read({"levels": "uniform", "hybrid": 0.001}))
    )
    drawn = draws(Objective(), 8)
    level = read({"levels": "uniform"}).levels(drawn["normal"], path)
    x = level.mix(data(8), drawn["noise"])
    time = path.time(level)
    assert isinstance(time, Tensor)
    guess = EPS.x0(x, 0.3 * x, level)
    expected = 0.001 * 20 * bound(TABLE, time.flatten().round(), x, data(8), guess, 0.1 * x)
    assert torch.allclose(both - plain, expected, rtol=1e-4)
    with pytest.raises(UsageError, match="twice the channels"):
        Objective(hybrid=0.1)(Model(scaled(1), path, EPS), data(8), draws(Objective(), 8), Cond())
    with pytest.raises(UsageError, match="no table"):
        Objective(hybrid=0.1).check(Model(network, Flow(), FLOW))


def test_alignment_is_zero_where_the_features_agree_and_leaves_no_hook() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1))
    align = Alignment("0", 6, 6)
    align.head = nn.Sequential(nn.Linear(6, 6, bias=False))
    nn.init.eye_(align.head[0].weight)
    with align.watching(network) as seen:
        network(torch.randn(2, 3, 4, 4))
    network(torch.randn(2, 3, 4, 4))
    assert len(seen) == 1
    assert align(seen[0], 3 * seen[0]).abs().max() < 1e-6
    assert torch.allclose(align(seen[0], -seen[0]), torch.full((2,), 2.0))
    tokens = seen[0].flatten(2).transpose(1, 2)
    assert align(tokens, seen[0]).abs().max() < 1e-6  # tokens are read row by row
    with pytest.raises(UsageError, match="no module 'mid'"), Alignment("mid", 6, 6).watching(network):
        pass


def test_alignment_can_be_learned() -> None:
    torch.manual_seed(0)
    align, hidden = Alignment("0", 4, 5), torch.randn(4, 4, 2, 2)
    target = torch.randn(4, 5, 4, 4)
    optimiser = torch.optim.Adam(align.parameters(), 0.01)
    before = align(hidden, target).mean().item()
    for _ in range(60):
        optimiser.zero_grad()
        align(hidden, target).mean().backward()
        optimiser.step()
    assert align(hidden, target).mean().item() < before / 4
