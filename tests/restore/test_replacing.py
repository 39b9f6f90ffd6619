"""ILVR, RePaint, time travel and blending: known parts are put in at the right level, and walks go up by the right noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import CLEAN, Level, Noise, UsageError, levels, sample, trajectory
from ldm_pipe.levels import jumps
from ldm_pipe.model import Estimate
from ldm_pipe.path import VP
from ldm_pipe.restore.blended import BlendedLatent, paste
from ldm_pipe.restore.ddnm import DDNM
from ldm_pipe.restore.ilvr import ILVR
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.restore.repaint import RePaint
from ldm_pipe.restore.text import parse
from ldm_pipe.restore.travel import Travel
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import climb

SHAPE = (2, 2, 2)
Draw = Callable[..., Tensor]


@pytest.mark.parametrize("method", [ILVR, RePaint])
def test_what_is_all_known_is_the_noised_image(reference: Any, grid: Any, noise: Noise, draw: Draw, method: Any) -> None:
    """At every level that is reached alpha y + sigma z of that level, at the end y, bit for bit."""
    y = draw(1, *SHAPE)
    sampler, walk = method(Measurement(Mask(torch.ones(1)), y), DDPM()), grid(6)
    for done in trajectory(reference("pool2", 0.0).prior, noise.start(), walk, sampler, noise):
        if done.there.sigma:
            assert torch.allclose(done.x, done.there.alpha * y + done.there.sigma * noise.at(done.number)("data"), atol=1e-14)
    assert torch.equal(done.x, y.expand_as(done.x))


@pytest.mark.parametrize("text", ["pool(2)", "grey", "blur(uniform, 3)", "cs(4)", "mask(box)", "bicubic(2)"])
def test_the_end_fits_the_data(text: str, draw: Draw) -> None:
    known: Any = parse(text)
    m = Measurement(known, known(draw(1, 3, 8, 8)))
    noise = Noise((1, 2), (3, 8, 8), dtype=torch.float64)
    for sampler in (ILVR(m, DDIM()), RePaint(m, DDPM())):
        end = sample(lambda x, level: Estimate(0.1 * x, x), noise.start(), levels.leading(VP.linear(), 5), sampler, noise)
        assert float(m.misfit(end).abs().max()) < 1e-10


def test_ilvr_by_parts_and_by_range(reference: Any, noise: Noise) -> None:
    """weight .5 goes half the way; below `least` nothing happens."""
    problem, here, there, x = reference("mask4", 0.0), Level(0.6, 0.8), Level(0.8, 0.6), noise.start()
    none, half, full = (
        ILVR(problem.measurement, DDPM(), w).step(problem.prior, x, here, there, None, noise.at(1)).x for w in (0.0, 0.5, 1.0)
    )
    assert torch.allclose(half, (none + full) / 2, atol=1e-14)
    assert float((full - none).abs().max()) > 0.1
    for least, same in ((0.42, full), (0.43, none)):  # u of `there` is 3 / 7
        one = ILVR(problem.measurement, DDPM(), least=least).step(problem.prior, x, here, there, None, noise.at(1)).x
        assert torch.equal(one, same)


def test_the_walk_of_repaint() -> None:
    """250 steps, jumps of 10, 10 times: 4571 levels, 2410 steps down, each stretch as often as it should be."""
    walk = levels.linspace(VP.linear(), 250)
    found = jumps(walk)
    place = {level: i for i, level in enumerate(walk)}
    steps = [place[b] - place[a] for a, b in itertools.pairwise(found)]
    assert (found[0], found[-1], len(found)) == (walk[0], CLEAN, 4571)
    assert set(steps) == {1, -1}
    assert steps.count(1) == 2410
    assert found.count(walk[-2]) == 10  # the least level is left ten times: nine times upwards
    assert found.count(walk[249 - 235]) == found.count(walk[249 - 5]) == 19
    assert [found.count(walk[249 - t]) for t in (249, 241, 240, 239, 231, 230)] == [1, 1, 10, 19 - 0, 19, 19]


@pytest.mark.parametrize(("length", "times"), [(1, 1), (3, 1), (1, 4), (3, 2), (7, 3), (50, 5)])
def test_jumps_of_any_size(length: int, times: int) -> None:
    walk = levels.leading(VP.linear(), 23)
    found = jumps(walk, length, times)
    stretches = len(range(0, 23 - length, length)) if length < 23 else 0
    assert len(found) == 24 + 2 * length * (times - 1) * stretches
    assert (times > 1 and stretches > 0) or found == walk
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="1 or more"):
            jumps(walk, *wrong)


def test_going_up_has_the_law_of_the_forward_process(draw: Draw) -> None:
    """alpha x0 + sigma z at one level becomes that at the other: by unit vectors, from a clean image and off the circle too."""
    for here, there in ((Level(0.9, 0.3), Level(0.5, 0.8)), (CLEAN, Level(0.6, 0.8)), (Level(0.7, 0.3), Level(0.4, 0.6))):
        eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        x0, z, fresh = (
            climb(a, here, there, b) for a, b in ((here.alpha * eye, zero), (here.sigma * eye, zero), (0 * eye, eye))
        )
        assert torch.allclose(x0, there.alpha * eye)
        assert torch.allclose(z @ z.T + fresh @ fresh.T, there.sigma**2 * eye)


@pytest.mark.parametrize("sampler", [lambda m: RePaint(m, DDPM()), lambda m: Travel(DDPM())], ids=["repaint", "travel"])
def test_the_network_is_not_asked_on_the_way_up(reference: Any, grid: Any, noise: Noise, sampler: Any) -> None:
    problem, asked = reference("mask4", 0.0), []

    def counting(x: Tensor, level: Level) -> Estimate:
        asked.append(level)
        return problem.prior(x, level)

    walk = jumps(grid(20), 5, 3)
    end = sample(counting, noise.start(), walk, sampler(problem.measurement), noise)
    assert asked == [a for a, b in itertools.pairwise(walk) if b.u < a.u]
    assert torch.isfinite(end).all()
    with pytest.raises(UsageError, match="does not travel"):
        sample(problem.prior, noise.start(), walk, DDPM(), noise)


def test_travelling_brings_ddnm_nearer_to_the_posterior(reference: Any, grid: Any) -> None:
    problem = reference("mask4", 0.0)
    guided = DDNM(problem.measurement)(problem.prior)
    found = [problem.judge(guided, Travel(Renoise(0.85)), jumps(grid(50), 5, times)).w2 for times in (1, 3, 9)]
    assert found[0] > 1.1 * found[1] > 1.2 * found[2]
    assert found[0] == problem.judge(guided, Renoise(0.85), grid(50)).w2


@pytest.mark.parametrize("keep", [torch.tensor([[1, 0], [0, 0]]), torch.ones(2, 2)])
def test_blending_is_repaint_with_a_mask_of_latents(reference: Any, grid: Any, noise: Noise, draw: Draw, keep: Tensor) -> None:
    background, prior, walk = draw(1, *SHAPE), reference("pool2", 0.0).prior, grid(12)
    blended = BlendedLatent(background, keep[None, None] != 0, DDIM())
    masked = Measurement(Mask(keep[None, None]), background)
    end = sample(prior, noise.start(), walk, blended, noise)
    assert torch.allclose(end, sample(prior, noise.start(), walk, RePaint(masked, DDIM()), noise), atol=1e-12)
    inside = keep[None, None].expand_as(end) != 0
    assert torch.equal(end[inside], background.expand_as(end)[inside])


def test_blending_from_an_image(draw: Draw) -> None:
    """The mask of the latents is the nearest pixel's, the background the codec's, and pasting keeps bits."""

    class Shrink:
        channels, factor = 3, 4

        def encode(self, images: Tensor) -> Tensor:
            return images[..., ::4, ::4]

    image, keep = draw(1, 3, 8, 8), torch.arange(64).reshape(1, 1, 8, 8) % 7 == 0
    blended = BlendedLatent.of(image, keep, Shrink(), DDIM())  # type: ignore[arg-type]
    assert torch.equal(blended.background, image[..., ::4, ::4])
    assert torch.equal(blended.keep, keep[..., ::4, ::4])
    pasted = paste(draw(2, 3, 8, 8).flip(0), image, keep)
    assert torch.equal(pasted[0][keep[0].expand(3, 8, 8)], image[0][keep[0].expand(3, 8, 8)])
    assert torch.equal(pasted[~keep.expand(2, 3, 8, 8)], draw(2, 3, 8, 8).flip(0)[~keep.expand(2, 3, 8, 8)])
