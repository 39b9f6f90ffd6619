"""h-space: directions by power iteration equal those of the singular value decomposition; a direction moves what it moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm_pipe import UsageError
from ldm_pipe.analysis.h_space import HSpace, apart, difference, jacobian_directions, principal
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level
from ldm_pipe.patch import Run, changed

WALK = tuple(Level(k / 4, 1 - k / 4) for k in range(5))


class Middle(nn.Module):
    """A network that is its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.mid_block(x)


def moved(patch: HSpace, step: int, x: Tensor) -> Tensor:
    network = Middle()
    token = ROWS.set(Rows(("cond",), len(x), WALK[step]))
    try:
        with changed(network, {n: [c] for n, c in patch.changes(network, Run(WALK)).items()}):
            return network(x)
    finally:
        ROWS.reset(token)


def test_the_middle_is_moved_by_the_steps_direction() -> None:
    x, many = torch.randn(2, 3, 4, 4), torch.randn(4, 3, 4, 4)
    for step in range(4):
        torch.testing.assert_close(moved(HSpace(many, 2.0), step, x), x + 2 * many[step])
        torch.testing.assert_close(moved(HSpace(many[0], -1.0), step, x), x - many[0])
    assert torch.equal(moved(HSpace(many[0], lo=0.6), 2, x), x)
    assert not torch.equal(moved(HSpace(many[0], lo=0.6), 0, x), x)
    with pytest.raises(UsageError, match="for 3 steps, the walk has 4"):
        moved(HSpace(many[:3]), 0, x)
    with pytest.raises(UsageError, match=r"the direction is \(3, 2, 2\)"):
        moved(HSpace(many[0, :, :2, :2]), 0, x)


def test_power_iteration_is_the_svd() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 15)).double().requires_grad_(False)
    h = torch.randn(3, 4, dtype=torch.float64)

    def f(h: Tensor) -> Tensor:
        return net(h.flatten())

    jacobian = torch.func.jacrev(f)(h).reshape(15, 12)
    _, s, v = torch.linalg.svd(jacobian)
    found, values = jacobian_directions(f, h, 3, rounds=300)
    assert found.shape == (3, 3, 4)
    torch.testing.assert_close(values, s[:3], rtol=1e-6, atol=0)
    for k in range(3):
        assert abs(float(found[k].flatten() @ v[k])) > 1 - 1e-8


def test_principal_components_of_a_planted_cloud() -> None:
    generator = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(24, 2, generator=generator, dtype=torch.float64))[0]
    weights = torch.randn(4000, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 2.0])
    h = (weights @ axes.T + 7).reshape(4000, 2, 3, 4)
    found, deviations = principal(h, 2)
    torch.testing.assert_close(deviations, torch.tensor([5.0, 2.0], dtype=torch.float64), rtol=0.05, atol=0)
    for k in range(2):
        assert abs(float(found[k].flatten() @ axes[:, k])) > 0.999
    with pytest.raises(UsageError, match="at most 2 directions"):
        principal(h[:2], 3)


def test_groups_and_what_lies_apart() -> None:
    with_it, without = torch.randn(5, 2, 2).double() + 3, torch.randn(7, 2, 2).double()
    direction = difference(with_it, without)
    torch.testing.assert_close(direction, with_it.mean(0) - without.mean(0))
    others = [torch.randn(2, 2).double() for _ in range(2)]
    left = apart(direction, *others)
    for other in others:
        assert abs(float((left * other).sum())) < 1e-12
    torch.testing.assert_close(apart(left, *others), left)


def test_another_layer_can_be_moved() -> None:
    network = nn.Sequential(nn.Identity(), nn.Identity())
    assert set(HSpace(torch.zeros(3, 4, 4), layer="1").changes(network, Run(WALK))) == {"1"}
    with pytest.raises(UsageError, match="'mid_block' is not a layer of Sequential"):
        HSpace(torch.zeros(3, 4, 4)).changes(network, Run(WALK))
