"""Noise belongs to the image: the same bits in any batch, other bits for any other seed, step or tag."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_pipe import Noise, UsageError
from ldm_pipe.noise import LIMIT, seeds_of

SHAPE = (4, 3, 5)
seeds = st.integers(0, LIMIT - 1)


@settings(deadline=None, max_examples=40)
@given(batch=st.lists(seeds, min_size=1, max_size=6), index=st.integers(0, 10_000))
def test_an_image_has_the_same_noise_in_any_batch(batch: list[int], index: int) -> None:
    noise = Noise(tuple(batch), SHAPE)
    draw, start = noise.at(index)("step"), noise.start()
    assert draw.shape == start.shape == (len(batch), *SHAPE)
    for k, seed in enumerate(batch):
        alone = Noise((seed,), SHAPE)
        assert torch.equal(alone.at(index)("step")[0], draw[k])
        assert torch.equal(alone.start()[0], start[k])
    back = noise.take(list(reversed(range(len(batch)))))
    assert torch.equal(back.at(index)("step"), draw.flip(0))


def test_every_seed_step_and_tag_has_noise_of_its_own() -> None:
    """Seeds that differ above bit 32 too, which torch's CPU generator would not tell apart."""
    draws = [Noise((1,), SHAPE).start()]
    draws += [
        Noise((s,), SHAPE).at(i)(tag)
        for s, i, tag in itertools.product((0, 1, 2**32, 2**33 + 1, LIMIT - 1), (0, 1, 2), ("step", "other"))
    ]
    flat = torch.stack([d.flatten() for d in draws]).double()
    products = flat @ flat.T / flat.shape[1]
    products.fill_diagonal_(0)
    assert len({tuple(row.tolist()) for row in flat}) == len(draws)
    assert products.abs().max() < 0.6  # of 60 values each: far below the 1 of equal draws


def test_a_draw_is_a_function_and_not_a_stream() -> None:
    noise = Noise((3, 4), SHAPE)
    first = noise.at(5)("step")
    noise.at(6)("step")
    assert torch.equal(noise.at(5)("step"), first)
    assert torch.equal(noise.at(5)(), first)
    later = noise.at(5)
    assert torch.equal(later("step"), later("step"))


def test_the_draws_are_standard_normal() -> None:
    draw = Noise(tuple(range(8)), (4, 64, 64), dtype=torch.float64).at(1)("step")
    count = draw.numel()
    assert abs(float(draw.mean())) < 5 / count**0.5
    assert abs(float(draw.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((draw.abs() < 1).double().mean()) - 0.682689) < 5 * 0.47 / count**0.5


def test_the_numbers_of_a_seed_never_change() -> None:
    """A recipe written today must make the same image tomorrow."""
    start = Noise((7,), (3,), dtype=torch.float64).start()[0]
    step = Noise((LIMIT - 1,), (3,), dtype=torch.float64).at(3)("step")[0]
    assert start.tolist() == [-0.4696246992899209, 1.4204051663628487, -1.0640042498881612]
    assert step.tolist() == [0.8525140407445709, 1.2097353316575559, 0.33227075087791497]


def test_fp32_is_the_float64_draw_rounded() -> None:
    wide = Noise((9,), SHAPE, dtype=torch.float64).start()
    assert torch.equal(Noise((9,), SHAPE).start(), wide.float())
    assert torch.equal(Noise((9,), SHAPE, device="cpu", dtype=torch.float16).start(), wide.half())


@pytest.mark.parametrize(
    ("seed", "count", "expected"),
    [(0, 2, (0, 1)), (LIMIT - 1, 1, (LIMIT - 1,)), (LIMIT - 3, 3, (LIMIT - 3, LIMIT - 2, LIMIT - 1)), (5, 0, ())],
)
def test_image_k_has_seed_plus_k(seed: int, count: int, expected: tuple[int, ...]) -> None:
    assert seeds_of(seed, count) == expected


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (LIMIT, 1), (LIMIT - 1, 2)])
def test_seeds_outside_64_bits_are_refused(seed: int, count: int) -> None:
    with pytest.raises(UsageError, match=f"seed is {seed}.*0 to {LIMIT - count}"):
        seeds_of(seed, count)


@pytest.mark.parametrize("seed", [-1, LIMIT])
def test_a_noise_refuses_such_seeds_too(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed is {seed}"):
        Noise((0, seed), SHAPE)
