"""Where two published methods are one: equal maps and covariances of whole walks, read off exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Gaussian, Level, Noise, sample, trajectory
from ldm_pipe.analysis import Affine, outcome, read_walk
from ldm_pipe.model import Denoiser
from ldm_pipe.restore.ddnm import DDNM
from ldm_pipe.restore.ddnm_plus import DDNMPlus
from ldm_pipe.restore.ddrm import DDRM
from ldm_pipe.restore.diffpir import DiffPIR
from ldm_pipe.restore.dmps import DMPS
from ldm_pipe.restore.dps import DPS, DPSScore
from ldm_pipe.restore.exact import ExactGuidance
from ldm_pipe.restore.ilvr import ILVR
from ldm_pipe.restore.latent import Latent
from ldm_pipe.restore.matrix import Matrix
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.restore.psld import PSLD
from ldm_pipe.restore.reddiff import REDDiff
from ldm_pipe.restore.repaint import RePaint
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import Sampler

SHAPE = (2, 2, 2)
Make = Callable[[str, float], Any]
Grid = Callable[[int], list[Level]]
both = pytest.mark.parametrize("operator", ["pool2", "mask4"])


def gap(a: Affine, b: Affine) -> float:
    return max(float((getattr(a, f) - getattr(b, f)).abs().max()) for f in ("matrix", "offset", "covariance"))


def read(denoise: Denoiser, walk: list[Level], sampler: Sampler) -> Affine:
    return read_walk(denoise, walk, sampler, SHAPE)


@both
@pytest.mark.parametrize(("steps", "eta"), [(20, 0.85), (100, 0.85), (20, 0.3), (20, 1.0)])
def test_ddnm_plus_is_ddrm(reference: Make, grid: Grid, operator: str, steps: int, eta: float) -> None:
    """With eta_b 1 and noisy data, from equal starts; and nearly so from each method's own."""
    problem = reference(operator, 0.1)
    one, other = DDNMPlus(problem.measurement, eta), DDRM(problem.measurement, eta)
    assert gap(read(problem.prior, grid(steps), one), read(problem.prior, grid(steps), other)) < 1e-13
    for a, b in zip(*(outcome(problem.prior, grid(steps), s, SHAPE) for s in (one, other)), strict=True):
        assert eta < 0.8 or float((a - b).abs().max()) < 1e-8  # with less fresh noise the start is remembered for longer
    assert (
        gap(read(problem.prior, grid(steps), one), read(problem.prior, grid(steps), DDRM(problem.measurement, eta, 0.9))) > 1e-3
    )


@both
def test_without_noise_in_the_data_diffpir_becomes_ddnm(reference: Make, grid: Grid, operator: str) -> None:
    """At zeta 1 and as the deviation goes to 0. At zeta below 1 it is another method: its noise follows from the new x0."""
    gaps = []
    for deviation in (1e-3, 1e-4):
        problem, m = reference(operator, 0.0), reference(operator, deviation).measurement
        ddnm = read(DDNM(problem.measurement)(problem.prior), grid(20), Renoise(1.0))
        gaps.append(gap(ddnm, read(DiffPIR(m, least=0.0)(problem.prior), grid(20), Renoise(1.0))))
    assert gaps[1] < 1e-3
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.05)  # it falls as the square of the deviation
    m, walk, kernel = problem.measurement, grid(100), Renoise(0.1**0.5)
    apart = [outcome(guide(m)(problem.prior), walk, kernel, SHAPE)[0] for guide in (DDNM, lambda m: DiffPIR(m, least=1e-9))]
    assert float((apart[0] - apart[1]).abs().max()) > 0.05


@both
def test_without_noise_in_the_data_ddrm_is_ddnm_but_for_the_last_step(reference: Make, grid: Grid, operator: str) -> None:
    problem, walk = reference(operator, 0.0), grid(20)
    ddnm, ddrm = DDNM(problem.measurement)(problem.prior), DDRM(problem.measurement, 1.0)
    assert gap(read(ddnm, walk[:-1], Renoise(1.0)), read(problem.prior, walk[:-1], ddrm)) < 1e-13
    assert gap(read(ddnm, walk, Renoise(1.0)), read(problem.prior, walk, ddrm)) > 1e-4
    mean = outcome(ddnm, walk, Renoise(1.0), SHAPE)[0].reshape(1, *SHAPE)
    assert float(problem.measurement.misfit(mean).abs().max()) < 1e-12
    mean = outcome(problem.prior, walk, ddrm, SHAPE)[0].reshape(1, *SHAPE)
    assert 1e-5 < float(problem.measurement.misfit(mean).abs().max()) < 1e-2


@both
def test_ilvr_is_repaint_is_replacement(reference: Make, grid: Grid, operator: str) -> None:
    """With A+A as the filter, without resampling; and so is the replacement of score-based inpainting, written out here."""
    problem, walk = reference(operator, 0.0), grid(40)
    ilvr = read(problem.prior, walk, ILVR(problem.measurement, DDPM()))
    assert gap(ilvr, read(problem.prior, walk, RePaint(problem.measurement, DDPM()))) < 1e-13
    a = problem.measurement.operator.matrix
    seen, whole = torch.linalg.pinv(a) @ a, torch.eye(8, dtype=torch.float64)
    clean, replaced = torch.linalg.pinv(a) @ problem.measurement.y[0], Affine(whole, 0 * whole[0], 0 * whole)
    for here, there in itertools.pairwise(walk):
        one = read(problem.prior, [here, there], DDPM())
        rest = whole - seen
        draw = rest @ one.covariance @ rest + there.sigma**2 * seen
        replaced = replaced.then(Affine(rest @ one.matrix, rest @ one.offset + there.alpha * clean, draw))
    assert gap(ilvr, replaced) < 1e-10


@both
@pytest.mark.parametrize("place", [0, 10, 19])
def test_under_a_flat_prior_they_are_exact(reference: Make, grid: Grid, noise: Noise, operator: str, place: int) -> None:
    """C = c I, c to infinity: DMPS with weight 1 is exact guidance, DiffPIR's x0 is E[x0 | x, y]. The gap falls as 1 / c."""
    problem, level, x = reference(operator, 0.1), grid(20)[place], noise.start()
    m, gaps = problem.measurement, []
    for c in (1e4, 1e5):
        flat = Gaussian(problem.prior.mean, c * level.ratio**2 * torch.eye(8, dtype=torch.float64))
        exact = flat.measured(m.operator.matrix, m.y, 0.1)(x, level).x0
        assert torch.allclose(ExactGuidance(m, flat.covariance)(flat)(x, level).x0, exact, rtol=1e-6)
        gaps += [float((g(flat)(x, level).x0 - exact).abs().max() / exact.abs().max()) for g in (DMPS(m, 1.0), DiffPIR(m))]
    assert max(gaps[:2]) < 1e-2
    assert gaps[2] == pytest.approx(gaps[0] / 10, rel=0.1)
    assert gaps[3] == pytest.approx(gaps[1] / 10, rel=0.1)


@both
def test_exact_guidance_is_the_posteriors_denoiser(reference: Make, grid: Grid, noise: Noise, operator: str) -> None:
    """With a mean that is not 0 too."""
    problem, x = reference(operator, 0.1), noise.start()
    prior = Gaussian(x[0].flatten(), problem.prior.covariance)
    right = prior.measured(problem.measurement.operator.matrix, problem.measurement.y, 0.1)
    for level in grid(7)[:-1]:
        found = ExactGuidance(problem.measurement, prior.covariance)(prior)(x, level)
        assert torch.allclose(found.x0, right(x, level).x0, atol=1e-9)
        assert torch.allclose(found.noise, right(x, level).noise, atol=1e-9)


@pytest.fixture
def latents(reference: Make, draw: Callable[..., Tensor], codec: Any) -> tuple[Any, Measurement, Measurement]:
    """(prior of five latents, the measurement through autograd, the same by the matrix A D)."""
    m = reference("pool2", 0.1).measurement
    prior = Gaussian(draw(5), torch.eye(5, dtype=torch.float64) + 0.5)
    return (prior, Measurement(Latent(m.operator, codec), m.y, 0.1),
            Measurement(Matrix(m.operator.matrix @ codec.matrix, (5, 1, 1)), m.y, 0.1))  # fmt: skip


@pytest.mark.parametrize(
    ("guide", "kernel"), [(DDNM, Renoise(0.85)), (DiffPIR, Renoise(0.3)), (lambda m: DPSScore(m, 0.01), DDPM())]
)
def test_a_linear_codec_makes_no_difference(grid: Grid, latents: Any, guide: Any, kernel: Sampler) -> None:
    """Through A after D by autograd, the same map as with the matrix A D."""
    prior, composed, matrix = latents
    walk = grid(40)
    one, other = (read_walk(guide(m)(prior), walk, kernel, (5, 1, 1)) for m in (composed, matrix))
    assert gap(one, other) < 1e-9
    assert float(other.matrix.abs().max()) + float(other.offset.abs().max()) > 0.1


def test_a_linear_codec_makes_no_difference_to_what_is_not_affine(grid: Grid, latents: Any) -> None:
    prior, composed, matrix = latents
    noise = Noise((1, 2), (5, 1, 1), dtype=torch.float64)
    for make in (lambda m: DPS(m, DDPM()), lambda m: REDDiff(m)):
        one, other = (
            sample(prior, make(m).start(noise.start(), grid(50)[0]), grid(50), make(m), noise) for m in (composed, matrix)
        )
        assert torch.allclose(one, other, atol=1e-9)


def test_decoding_projecting_and_encoding_is_another_map(latents: Any, codec: Any, draw: Callable[..., Tensor]) -> None:
    """It leaves the data unmet; only after many rounds are they met. The projection in latents meets them at once."""
    _, composed, _ = latents
    pixels, y = composed.operator.operator, composed.operator(draw(1, 5, 1, 1))
    z = again = -draw(3, 5, 1, 1)

    def left(latent: Tensor) -> float:
        return float((composed.operator(latent) - y).abs().max())

    assert left(composed.operator.prox(z, 0.0, y)) < 1e-10
    for _ in range(200):
        again = codec.encode(pixels.prox(codec.decode(again), 0.0, y))
    assert left(codec.encode(pixels.prox(codec.decode(z), 0.0, y))) > 0.1 > 1e-3 > left(again)


def test_the_two_terms_of_psld(grid: Grid, latents: Any, codec: Any, reference: Make) -> None:
    """PSLD without the gluing is latent DPS; with it alone, x moves as the formula says, written out in matrices."""
    prior, composed, _ = latents
    noise, m = Noise((1, 2), (5, 1, 1), dtype=torch.float64), reference("pool2", 0.1).measurement
    x = noise.start()
    ends = [
        list(trajectory(prior, x, grid(20), s, noise))[-1].x for s in (PSLD(m, codec, DDIM(), 0.3, 0.0), DPS(composed, DDIM()))
    ]
    assert torch.allclose(*ends, atol=1e-10)
    level = grid(20)[5]
    step = PSLD(m, codec, DDIM(), 0.0, 1.0).step(prior, x, level, grid(20)[6], None, noise.at(0))
    plain = DDIM().step(prior, x, level, grid(20)[6], None, noise.at(0))
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        z0 = prior(leaf, level).x0
        image = codec.decode(z0)
        pinv = torch.linalg.pinv(m.operator.matrix)
        glued = codec.encode((image.flatten(1) + (m.y - image.flatten(1) @ m.operator.matrix.T) @ pinv.T).reshape(-1, *SHAPE))
        pull = torch.autograd.grad((z0 - glued).flatten(1).square().sum(1).sqrt().sum(), leaf)[0]
    assert torch.allclose(step.x, plain.x - pull, atol=1e-12)
    assert float(pull.abs().max()) > 1e-3
