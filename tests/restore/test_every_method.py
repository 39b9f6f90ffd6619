"""Laws that hold for every restoration method; most of them join by their row in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_pipe import Flow, Gaussian, Level, Noise, UsageError, build, levels, registry, sample, trajectory
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.path import VP
from ldm_pipe.restore.exact import ExactGuidance
from ldm_pipe.restore.latent import Latent
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.matrix import Matrix
from ldm_pipe.restore.operator import Measurement
from ldm_pipe.restore.travel import Travel
from ldm_pipe.samplers.ddim import DDIM
from ldm_pipe.samplers.ddpm import DDPM
from ldm_pipe.samplers.dpm2m import DPM2M
from ldm_pipe.samplers.renoise import Renoise
from ldm_pipe.walk import Sampler

SHAPE = (2, 2, 2)


@dataclass(frozen=True)
class Halved:
    """A codec that halves."""

    channels: int = 2
    factor: int = 1

    def encode(self, images: Tensor) -> Tensor:
        return images / 2

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * latents

    def raw(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device: torch.device, dtype: torch.dtype) -> Halved:
        return self


Method = Callable[[Measurement], Any]


def named(name: str, **fields: Any) -> Method:
    return lambda m: build("restoration", name, measurement=m, **fields)


METHODS: dict[str, Method] = {
    **{n: named(n) for n in ("adir", "ddnm", "ddnm_plus", "ddnm_scaled", "ddrm", "diffpir", "dmps", "dps_score", "reddiff")},
    **{n: named(n, sampler=DDPM()) for n in ("ccdf", "dps", "ilvr", "repaint", "truncated")},
    "dps poisson": named("dps", sampler=DDPM(), poisson=True),
    "dps on 2m": named("dps", sampler=DPM2M()),
    "psld": lambda m: build("restoration", "psld", measurement=m, codec=Halved(), sampler=DDIM()),
    "resample": lambda m: build("restoration", "resample", measurement=m, codec=Halved(), sampler=DDIM(), every=2, begin=1.01),
    "blended": lambda m: build("restoration", "blended", background=m.y.reshape(1, 4, 1, 1)[:, :2].expand(1, 2, 2, 2),
                               keep=torch.eye(2)[None, None] > 0, sampler=DDPM()),
    "exact": lambda m: ExactGuidance(m, torch.eye(8, dtype=torch.float64)),
    "travel": lambda m: Travel(Renoise()),
}  # fmt: skip
# A step along a gradient with respect to x has the units of x, so it is another step on another path.
BY_UNITS = {"adir", "dps", "dps poisson", "dps on 2m", "psld", "resample"}
every = pytest.mark.parametrize("name", METHODS)
path_free = pytest.mark.parametrize("name", [n for n in METHODS if n not in BY_UNITS])


@pytest.fixture
def prior() -> Gaussian:
    index = torch.arange(8, dtype=torch.float64)
    return Gaussian(torch.sin(index), 0.9 ** (index[:, None] - index).abs())


@pytest.fixture
def measurement(draw: Callable[..., Tensor]) -> Measurement:
    return Measurement(Matrix(draw(4, 8), SHAPE), draw(1, 4), 0.2)


def ready(method: Any, denoise: Denoiser) -> tuple[Denoiser, Sampler]:
    """A Guide with the kernel of DDRM, or a Sampler."""
    return (denoise, method) if hasattr(method, "step") else (method(denoise), Renoise())


def run(method: Any, denoise: Denoiser, walk: list[Level], noise: Any) -> Tensor:
    guided, sampler = ready(method, denoise)
    return sample(guided, sampler.start(noise.start(), walk[0]), walk, sampler, noise)


WALKS = {
    "flow from pure noise": levels.linspace(Flow(), 7),
    "zero-terminal table": levels.trailing(VP.scaled_linear().zero_terminal(), 7),
    "table": levels.leading(VP.linear(), 7),
    "one step from pure noise": [Level(0.0, 1.0), Level(1.0, 0.0)],
    "a level twice": [Level(0.3, 0.9), Level(0.6, 0.8), Level(0.6, 0.8), Level(1.0, 0.0)],
    "stops before clean": [Level(0.0, 1.0), Level(0.5, 0.5), Level(0.9, 0.1)],
}


@every
@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS.keys())
def test_end_points_are_finite_or_refused_by_name(
    prior: Gaussian, noise: Noise, measurement: Measurement, name: str, walk: list[Level]
) -> None:
    if name == "dmps" and walk[0].alpha == 0:
        with pytest.raises(UsageError, match="alpha = 0"):
            run(METHODS[name](measurement), prior, walk, noise)
        return
    end = run(METHODS[name](measurement), prior, walk, noise)
    assert end.dtype == torch.float64
    assert torch.isfinite(end).all()


@path_free
@pytest.mark.parametrize("coordinates", ["flow", "ve", "any"])
def test_the_same_images_on_every_path(
    prior: Gaussian, noise: Noise, measurement: Measurement, name: str, coordinates: str
) -> None:
    """Each level scaled by a factor of its own: x scales with it, x0 does not notice."""
    walk = levels.leading(VP.scaled_linear(), 9)
    factors = {
        "flow": [1 / (lv.alpha + lv.sigma) for lv in walk],
        "ve": [1 / lv.alpha for lv in walk],
        "any": [0.3 + (7 * i % 10) / 3 for i in range(len(walk))],
    }[coordinates]
    carried = [Level(c * lv.alpha, c * lv.sigma) for c, lv in zip(factors, walk, strict=True)]
    if name in ("repaint", "travel"):  # and up again
        walk, carried, factors = ([*w[:6], *w[3:]] for w in (walk, carried, factors))  # type: ignore[misc]
    denoise, sampler = ready(METHODS[name](measurement), prior)
    x = noise.start()
    here = trajectory(denoise, sampler.start(x, walk[0]), walk, sampler, noise)
    there = trajectory(denoise, sampler.start(x, carried[0]), carried, sampler, noise)
    for a, b, factor in zip(here, there, factors[1:], strict=True):
        assert torch.allclose(b.estimate.x0, a.estimate.x0, rtol=1e-8, atol=1e-8)
        assert torch.allclose(b.x, a.x * factor, rtol=1e-8, atol=1e-8)


@every
def test_an_image_does_not_depend_on_its_batch(prior: Gaussian, measurement: Measurement, name: str) -> None:
    walk = levels.leading(VP.scaled_linear(), 6)

    def of(seeds: tuple[int, ...]) -> Tensor:
        return run(METHODS[name](measurement), prior, walk, Noise(seeds, SHAPE, dtype=torch.float64))

    whole = of((1, 2, 3))
    assert torch.allclose(whole, torch.cat([of((s,)) for s in (1, 2, 3)]), rtol=1e-9, atol=1e-9)
    assert float((whole[0] - whole[1]).abs().max()) > 1e-3


@every
def test_an_image_does_not_depend_on_the_data_of_others(prior: Gaussian, measurement: Measurement, name: str) -> None:
    """One y for each image gives what each y gives alone."""
    if name in ("blended", "travel"):
        return
    walk, m = levels.leading(VP.scaled_linear(), 6), measurement
    two = torch.cat([m.y, -m.y])
    both = run(METHODS[name](Measurement(m.operator, two, 0.2)), prior, walk, Noise((1, 2), SHAPE, dtype=torch.float64))
    for k in range(2):
        alone = Measurement(m.operator, two[k : k + 1], 0.2)
        one = run(METHODS[name](alone), prior, walk, Noise((1 + k,), SHAPE, dtype=torch.float64))
        assert torch.allclose(both[k : k + 1], one, rtol=1e-9, atol=1e-9)


@every
def test_a_method_keeps_nothing_between_runs(prior: Gaussian, noise: Noise, measurement: Measurement, name: str) -> None:
    walk, method = levels.leading(VP.scaled_linear(), 5), METHODS[name](measurement)
    first = run(method, prior, walk, noise)
    run(method, prior, walk[1:], noise)
    assert torch.equal(first, run(method, prior, walk, noise))


class Forbidden:
    """Noise that must not be drawn."""

    def at(self, index: int) -> StepNoise:
        def draw(tag: str = "step") -> Tensor:
            raise AssertionError("drew noise")

        return draw


@every
def test_no_noise_is_drawn_in_a_step_into_clean(prior: Gaussian, noise: Noise, measurement: Measurement, name: str) -> None:
    denoise, sampler = ready(METHODS[name](measurement), prior)
    walk = levels.leading(VP.scaled_linear(), 4)[-2:]
    assert torch.isfinite(sample(denoise, noise.start(), walk, sampler, Forbidden())).all()


@every
def test_the_network_is_asked_once_a_step_and_left_without_a_graph(
    prior: Gaussian, noise: Noise, measurement: Measurement, name: str
) -> None:
    asked = 0

    def counting(x: Tensor, level: Level) -> Estimate:
        nonlocal asked
        asked += 1
        return prior(x, level)

    denoise, sampler = ready(METHODS[name](measurement), counting)
    for done in trajectory(denoise, noise.start(), levels.leading(VP.linear(), 6), sampler, noise):
        assert not any(t.requires_grad for t in (done.x, done.estimate.x0, done.estimate.noise))
    assert asked == 6


NEUTRAL = {
    "dps": named("dps", sampler=DPM2M(), scale=0.0),
    "ilvr": named("ilvr", sampler=DPM2M(), weight=0.0),
    "ilvr above 1": named("ilvr", sampler=DPM2M(), least=1.01),
    "psld": lambda m: build("restoration", "psld", measurement=m, codec=Halved(), sampler=DPM2M(), omega=0.0, gamma=0.0),
    "resample": lambda m: build("restoration", "resample", measurement=m, codec=Halved(), sampler=DPM2M(), scale=0.0, every=0),
    "resample before it begins": lambda m: build(
        "restoration", "resample", measurement=m, codec=Halved(), sampler=DPM2M(), scale=0.0, begin=0.0, every=1
    ),
    "travel": lambda m: Travel(DPM2M()),
    "truncated from noise": named("truncated", sampler=DPM2M(), estimate=torch.zeros(1, *SHAPE)),
    "repaint of nothing": lambda m: build(
        "restoration", "repaint", measurement=Measurement(Mask(torch.zeros(1)), torch.zeros(1, *SHAPE)), sampler=DPM2M()
    ),
    "ilvr of nothing": lambda m: build(
        "restoration", "ilvr", measurement=Measurement(Mask(torch.zeros(1)), torch.zeros(1, *SHAPE)), sampler=DPM2M()
    ),
    "blend of nothing": lambda m: build(
        "restoration", "blended", background=torch.ones(1, *SHAPE), keep=torch.zeros(1, dtype=torch.bool), sampler=DPM2M()
    ),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_samplers_change_no_bit(prior: Gaussian, noise: Noise, measurement: Measurement, name: str) -> None:
    walk = WALKS["zero-terminal table"]
    method = NEUTRAL[name](measurement)
    assert torch.equal(run(method, prior, walk, noise), run(DPM2M(), prior, walk, noise))


@pytest.mark.parametrize(("name", "field"), [("diffpir", "blend"), ("dmps", "weight"), ("dps_score", "scale")])
def test_neutral_guides_are_the_denoiser(prior: Gaussian, measurement: Measurement, name: str, field: str) -> None:
    assert named(name, **{field: 0.0})(measurement)(prior) is prior


def test_data_that_say_nothing_leave_x0_alone(prior: Gaussian, noise: Noise) -> None:
    """A mask that knows nothing, and a weight of the network against the data that goes to infinity."""
    level, x = WALKS["table"][3], noise.start()
    nothing = Measurement(Mask(torch.zeros(1)), torch.zeros(1, *SHAPE))
    whole = Measurement(Mask(torch.ones(1)), torch.ones(1, *SHAPE), 0.1)
    plain = prior(x, level)
    for guide in (named("ddnm")(nothing), named("diffpir")(nothing), named("dmps")(nothing)):
        assert torch.equal(guide(prior)(x, level).x0, plain.x0)
    assert torch.allclose(named("diffpir", weight=1e14)(whole)(prior)(x, level).x0, plain.x0, atol=1e-10)


def test_a_learned_variance_is_passed_on(prior: Gaussian, noise: Noise, measurement: Measurement) -> None:
    def with_variance(x: Tensor, level: Level) -> Estimate:
        return prior(x, level)._replace(log_var=0.3 * torch.ones_like(x))

    level = WALKS["table"][2]
    for name in ("ddnm", "diffpir", "dmps", "dps_score", "exact"):
        log_var = METHODS[name](measurement)(with_variance)(noise.start(), level).log_var
        assert log_var is not None
        assert bool((log_var == 0.3).all())
    learned = named("dps", sampler=DDPM("learned"))(measurement)
    assert torch.isfinite(run(learned, with_variance, WALKS["table"], noise)).all()


def test_every_method_has_a_test() -> None:
    assert {n.split(" ")[0] for n in METHODS} >= set(registry.KINDS["restoration"])


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("dnm", {}, "did you mean 'ddnm'"),
        ("ddnm", {}, "needs measurement"),
        ("ddrm", {"etta": 1}, "did you mean 'eta'"),
        ("ddrm", {"eta": "much"}, "finite number"),
        ("dps", {"sampler": "ddpm"}, "it takes Sampler"),
        ("diffpir", {"blend": None}, "finite number"),
    ],
)
def test_what_is_wrong_is_named(measurement: Measurement, name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build("restoration", name, **fields, **({"measurement": measurement} if fields else {}))


def test_data_without_noise_cannot_be_divided_by(measurement: Measurement) -> None:
    with pytest.raises(UsageError, match="give one or use dps"):
        named("dps_score")(Measurement(measurement.operator, measurement.y))


@pytest.mark.parametrize("name", ["adir", "ccdf", "ddnm_plus", "ddrm", "dmps", "ilvr", "repaint", "psld"])
def test_what_needs_a_spectrum_says_so(prior: Gaussian, noise: Noise, measurement: Measurement, name: str) -> None:
    without = Measurement(Latent(measurement.operator, Halved()), measurement.y, 0.2)
    with pytest.raises(UsageError, match="Latent has no singular values"):
        run(METHODS[name](without), prior, WALKS["table"], noise)


@pytest.mark.parametrize("name", ["ddnm", "ddnm_scaled", "diffpir", "dps", "dps_score", "reddiff", "truncated"])
@pytest.mark.parametrize("operator", ["jpeg", "clip"])
def test_what_needs_no_spectrum_takes_any_operator(name: str, operator: str) -> None:
    noise, known = Noise((1,), (3, 8, 8), dtype=torch.float64), build("operator", operator)
    prior = Gaussian.isotropic(torch.zeros(3, 8, 8), 0.5)
    m = Measurement(known, known(0.3 * noise.at(9)("truth")), 0.05)
    end = run(METHODS[name](m), prior, levels.leading(VP.linear(), 20), noise)
    assert torch.isfinite(end).all()
    plain = run(Renoise(), prior, levels.leading(VP.linear(), 20), noise)
    if name in ("ddnm", "diffpir", "reddiff"):
        assert float(m.misfit(end).norm()) < 0.6 * float(m.misfit(plain).norm())
