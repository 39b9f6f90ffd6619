"""Encoder propagation: exact where nothing is reused, the way down only at key steps, the noise of the start where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CFG, Between, Estimate, Model, UsageError, build, levels
from ldm_pipe.cond import ROWS, Rows
from ldm_pipe.level import Level
from ldm_pipe.patch import Run, changed, root
from ldm_pipe.speed.faster import Faster, PriorNoise

Draw = Callable[..., Tensor]


def test_the_key_steps_are_the_papers() -> None:
    assert Faster().at(50) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert Faster().at(20) == (0, 1, 2, 3, 4, 6, 10, 14)
    assert Faster().at(25) == (0, 1, 2, 3, 5, 8, 12, 18)
    assert Faster().at(2) == (0, 1)
    assert Faster("all").at(3) == (0, 1, 2)
    assert Faster("2 7 99").at(10) == (0, 2, 7)


def test_the_way_down_runs_at_key_steps_only(draw: Draw, counting: Any) -> None:
    count = counting("conv_in", "down_blocks.1", "mid_block", "up_blocks.0", "conv_out")
    draw(count, Faster("0 1 4 6", inject=0.0), steps=10)
    assert count.found == {"conv_in": 4, "down_blocks.1": 4, "mid_block": 4, "up_blocks.0": 10, "conv_out": 10}


@torch.no_grad()
def test_reuse_is_exact_at_the_same_time_and_blind_to_x(model: Model) -> None:
    """What is kept depends on the key step alone: another x gives the same output, at the key's own time the same bits."""
    network, run = root(model), Run((Level(0.1, 0.9), Level(0.1001, 0.8999), Level(1.0, 0.0)))
    changes = {n: [c] for n, c in Faster("0").changes(network, run).items()}
    x, other, tokens = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 12).double()
    time, later = torch.tensor([900.0, 900.0]), torch.tensor([500.0, 500.0])
    plain = network(x, time, encoder_hidden_states=tokens)[0]
    with changed(network, changes):
        found = []
        for level, given, when in ((0, x, time), (1, other, time), (1, x, later), (1, other, later)):
            token = ROWS.set(Rows(("cond",), 2, run.levels[level]))
            found.append(network(given, when, encoder_hidden_states=tokens)[0])
            ROWS.reset(token)
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], plain)
    assert torch.equal(found[2], found[3])
    assert not torch.allclose(found[2], plain)
    assert not torch.allclose(found[2], network(x, later, encoder_hidden_states=tokens)[0])


def test_fewer_keys_are_further_from_the_whole(draw: Draw) -> None:
    plain = draw()
    errors = [float((draw(Faster(keys, 0.0)) - plain).norm()) for keys in ("all", "0 1 2 3 4 5 6 8", "0 2 4 6 8", "0")]
    assert errors[0] == 0
    assert errors == sorted(errors)


@pytest.mark.parametrize("rule", [CFG(3), CFG(1), Between(0.3, 0.8, CFG(3))])
def test_parallel_ways_up_are_the_serial_ones(rule: Any, draw: Draw) -> None:
    for sampler in ("ddim", "heun"):
        serial, at_once = (draw(Faster("0 1 4 6", 0.0, parallel), sampler=sampler, rule=rule) for parallel in (False, True))
        if sampler == "ddim" and isinstance(rule, CFG):
            torch.testing.assert_close(at_once, serial, rtol=1e-9, atol=1e-9)
        assert bool(at_once.isfinite().all())
    keys_only = draw(Faster("all", 0.0, parallel=True), rule=rule)
    assert torch.equal(keys_only, draw(rule=rule))


def test_parallel_asks_the_network_at_key_steps_only(draw: Draw, counting: Any) -> None:
    count = counting("conv_in", "mid_block", "up_blocks.0", "conv_out")
    draw(count, Faster("0 1 4 6", 0.0, parallel=True), steps=10)
    assert count.found == {"conv_in": 4, "mid_block": 4, "up_blocks.0": 4, "conv_out": 4}


@torch.no_grad()
def test_parallel_with_features_from_outside_and_tokens_that_change(model: Model) -> None:
    """A ControlNet's residuals go to every step of the batch; with other tokens nothing that was kept is given."""
    walk = tuple(levels.trailing(model.path, 4))
    network, run = root(model), Run.of(model, walk)
    generator = torch.Generator().manual_seed(1)
    x, tokens, other = (torch.randn(2, *s, generator=generator).double() for s in ((4, 8, 8), (5, 12), (5, 12)))
    shapes = [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 2
    down = [torch.randn(2, c, s, s, generator=generator).double() for c, s in shapes]
    given: dict[str, Any] = {"down_block_additional_residuals": down, "mid_block_additional_residual": down[-1]}

    def ask(step: int, text: Tensor) -> Tensor:
        token = ROWS.set(Rows(("cond",), 2, walk[step]))
        out: Tensor = network(x, torch.tensor([run.times[step]] * 2), encoder_hidden_states=text, **given)[0]
        ROWS.reset(token)
        return out

    plain = [ask(k, tokens) for k in range(2)]
    anew = ask(1, other)
    with changed(network, {n: [c] for n, c in Faster("0 2", 0.0).changes(network, run).items()}):
        serial = [ask(k, tokens) for k in range(2)]
    with changed(network, {n: [c] for n, c in Faster("0 2", 0.0, parallel=True).changes(network, run).items()}):
        at_once = [ask(k, tokens) for k in range(2)]
        ask(0, tokens)
        torch.testing.assert_close(ask(1, other), anew)
    torch.testing.assert_close(at_once[0], plain[0])
    torch.testing.assert_close(at_once[1], serial[1])
    assert not torch.allclose(serial[1], plain[1])


def test_heun_asks_twice_and_counts_one_step(draw: Draw, counting: Any) -> None:
    count = counting("conv_in", "conv_out")
    draw(count, Faster("0 2", inject=0.0), sampler="heun", steps=4)
    assert count.found["conv_out"] == 7
    assert count.found["conv_in"] == 3  # step 0, and step 2 both as the end of step 1 and as its own beginning


def test_the_first_noise_joins_as_in_the_official_step() -> None:
    """DDIM from x + c x_T with the noise that was found at x."""
    generator = torch.Generator().manual_seed(5)
    first, x = (torch.randn(1, 4, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    here, there = Level(0.8, 0.6), Level(0.9, 0.19**0.5)
    denoise = lambda x, level: Estimate((x - level.sigma * torch.tanh(x)) / level.alpha, torch.tanh(x))  # noqa: E731
    sampler = PriorNoise(build("sampler", "ddim"), 0.01, until=0.5)
    noise: Any = None
    done = sampler.step(denoise, x, here, there, (first, None), noise)
    moved = x + 0.01 * first
    expected = there.alpha * (moved - here.sigma * torch.tanh(x)) / here.alpha + there.sigma * torch.tanh(x)
    torch.testing.assert_close(done.x, expected)
    above = Level(0.3, 0.7)
    plain = build("sampler", "ddim").step(denoise, x, above, here, None, noise)
    assert torch.equal(sampler.step(denoise, x, above, here, (first, None), noise).x, plain.x)


def test_injection_is_of_the_start_and_in_the_second_half(draw: Draw, model: Model) -> None:
    run = Run(tuple(levels.trailing(model.path, 10)))
    inner = build("sampler", "ddim")
    made = Faster("all", 0.1).sampler(inner, run)
    assert sum(float(level.u) <= made.until for level in run.levels[:-1]) == 5
    assert Faster("all", 0.0).sampler(inner, run) is inner
    assert not torch.allclose(draw(Faster("all", 0.1)), draw())


def test_a_network_of_no_unet_is_refused() -> None:
    with pytest.raises(UsageError, match="no way down"):
        Faster().changes(torch.nn.Linear(1, 1), Run((Level(0.1, 0.9), Level(1.0, 0.0))))
