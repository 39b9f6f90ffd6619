"""Every operator by the laws of linear algebra, on random images in float64; and against an independent way to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_pipe import UsageError, build, registry
from ldm_pipe.restore.blur import Blur
from ldm_pipe.restore.function import Function
from ldm_pipe.restore.mask import Mask
from ldm_pipe.restore.matrix import Matrix
from ldm_pipe.restore.operator import Linear, Operator
from ldm_pipe.restore.spectrum import LEAST
from ldm_pipe.restore.text import parse

Draw = Callable[..., Tensor]
CROOKED = torch.tensor([[0.6, 0.3, 0.0], [0.0, 0.2, 0.1], [-0.1, 0.0, 0.0]]).double()
WIDE = torch.randn(5, 3 * 8 * 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LINEAR: dict[str, Any] = {
    **{t: parse(t) for t in (
        "pool(4)", "pool(2)", "pool(1)", "bicubic(4)", "bicubic(2)", "blur(gaussian, 3)", "blur(uniform, 3)",
        "blur(gaussian, 0.7)", "blur_zero(gaussian, 3)", "blur_zero(uniform, 5)", "mask(half)", "mask(box)", "grey", "cs(4)",
        "cs(2, 7)",
    )},
    "blur(crooked)": Blur(CROOKED),
    "mask(tensor)": Mask(torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(2)) > 0.4),
    "mask(all)": Mask(torch.ones(1)),
    "mask(nothing)": Mask(torch.zeros(1)),
    "wide matrix": Matrix(WIDE, (3, 8, 16)),
    "flat matrix": Matrix(torch.cat([WIDE, WIDE[:2] - WIDE[3:]]), (3, 8, 16)),
    "tall matrix": Matrix(torch.cat([torch.eye(384), torch.eye(384)[:9]]).double(), (3, 8, 16)),
}  # fmt: skip
linear = pytest.mark.parametrize("operator", LINEAR.values(), ids=LINEAR.keys())


@pytest.fixture
def x(draw: Draw) -> Tensor:
    return draw(2, 3, 8, 16)


def near(a: Tensor, b: Tensor, within: float = 1e-11) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) < within


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


@linear
def test_the_adjoint(operator: Linear, x: Tensor, draw: Draw) -> None:
    """<A x, v> = <x, A' v>; and autograd's adjoint is the same."""
    v = draw(*operator(x).shape)
    assert near(dot(operator(x), v), dot(x, operator.adjoint(v)))
    assert near(operator.pullback(x, v), operator.adjoint(v))


@linear
def test_the_spectrum(operator: Linear, x: Tensor) -> None:
    """A = U S V' with V' and V orthogonal and inverse, U' U = 1 where s is not 0, and s above the least value or 0."""
    a = operator.spectrum((3, 8, 16), x)
    c = a.vt(x)
    assert near(operator(x), a.u(a.s * c))
    assert near(a.v(c), x)
    assert near(dot(c, c), dot(x, x))
    c = torch.where(a.known, c, 0.0)
    assert near(torch.where(a.known, a.ut(a.u(c)), 0.0), c)
    assert near(dot(a.u(c), a.u(c)), dot(c, c))
    assert bool(((a.s == 0) | (a.s >= LEAST)).all())


@linear
def test_the_pseudo_inverse(operator: Linear, x: Tensor) -> None:
    """A A+ A = A, A+ A A+ = A+, and A+ A is a projection that is its own adjoint."""

    def known(z: Tensor) -> Tensor:
        return operator.pinv(operator(z))

    y = operator(x)
    assert near(operator(operator.pinv(y)), y)
    assert near(operator.pinv(operator(operator.pinv(y))), operator.pinv(y), 1e-8)
    assert near(known(known(x)), known(x), 1e-8)
    assert near(dot(known(x), x.flip(0)), dot(x, known(x.flip(0))), 1e-8)


@linear
@pytest.mark.parametrize("rho", [0.0, 1e-3, 0.7])
def test_the_proximal_map(operator: Linear, x: Tensor, draw: Draw, rho: float) -> None:
    """Its gradient A' (A x - y) + rho (x - z) is zero; at rho = 0 what A does not see stays."""
    y = operator(draw(2, 3, 8, 16).flip(3)) + 0.1
    found = operator.prox(x, rho, y)
    assert near(operator.adjoint(operator(found) - y) + rho * (found - x), torch.zeros_like(x), 1e-10)
    if rho == 0:
        move = found - x
        assert near(operator.pinv(operator(move)), move, 1e-8)


@linear
def test_the_proximal_map_by_autograd_is_the_same(operator: Linear, x: Tensor, draw: Draw) -> None:
    """One Gauss-Newton step by conjugate gradients, as operators without a spectrum have it."""
    y = operator(draw(2, 3, 8, 16).flip(3))
    for rho in (0.01, 0.7):
        assert near(Function(operator).prox(x, rho, y), operator.prox(x, rho, y), 1e-5)
        assert near(Operator.prox(operator, x, rho, y), operator.prox(x, rho, y), 1e-5)  # with its own derivative


@linear
def test_gradients_pass_the_proximal_map(operator: Linear, x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    operator.prox(leaf, 0.0, operator(x)).sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", ["pool(4)", "grey", "blur(gaussian, 3)", "cs(4)", "mask(half)", "bicubic(2)"])
def test_single_precision_stays_single(name: str, x: Tensor) -> None:
    operator = LINEAR[name]
    y = operator(x.float())
    assert y.dtype == operator.pinv(y).dtype == operator.prox(x.float(), 0.1, y).dtype == torch.float32
    assert near(y.double(), operator(x), 1e-5)


def hadamard(x: Tensor) -> Tensor:
    signs = torch.ones(1, 1, dtype=torch.float64)
    while len(signs) < 128:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), signs)
    kept = LINEAR["cs(4)"].spectrum((3, 8, 16), x).known
    return (x.flatten(2) @ signs / 128**0.5)[..., kept].reshape(-1, 3, 8, 4)


def convolved(x: Tensor, kernel: Tensor, mode: str = "circular") -> Tensor:
    """A true convolution, where torch's correlates; the picture goes on around the border, or with zeros."""
    r = len(kernel) // 2
    return F.conv2d(F.pad(x, (r, r, r, r), mode=mode), kernel.double().flip(0, 1).expand(3, 1, -1, -1), groups=3)


DIRECT: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "pool(4)": (lambda x: F.avg_pool2d(x, 4), 1e-11),
    "grey": (lambda x: x.mean(1, keepdim=True), 1e-11),
    "bicubic(2)": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True), 0.01),
    "blur(crooked)": (lambda x: convolved(x, CROOKED), 1e-11),
    "blur(uniform, 3)": (lambda x: convolved(x, torch.full((3, 3), 1 / 9)), 0.01),
    "blur_zero(uniform, 5)": (lambda x: convolved(x, torch.full((5, 5), 1 / 25), "constant"), 0.01),
    "wide matrix": (lambda x: x.flatten(1) @ WIDE.T, 1e-11),
    "cs(4)": (hadamard, 1e-11),
    "mask(half)": (lambda x: torch.where(torch.arange(16) < 8, x, 0.0), 1e-11),
    "mask(box)": (lambda x: x - F.pad(x[..., 2:6, 4:12], (4, 4, 2, 2)), 1e-11),
}


@pytest.mark.parametrize("name", DIRECT)
def test_against_direct_computations(name: str, x: Tensor) -> None:
    """None of these goes through a spectrum; those with small singular values agree up to what was dropped."""
    direct, within = DIRECT[name]
    assert near(LINEAR[name](x), direct(x), within)


def test_small_singular_values_are_dropped(x: Tensor) -> None:
    """A wide blur loses fine detail for good: its inverse leaves it at 0 instead of raising rounding a thousandfold."""
    a = LINEAR["blur(gaussian, 3)"].spectrum((3, 8, 16), x)
    assert 0 < int(a.known.sum()) < 64
    assert float(LINEAR["blur(gaussian, 3)"].pinv(x).abs().max()) < 1e3 * float(x.norm())


def test_projection_onto_a_mask_keeps_bits(x: Tensor) -> None:
    for name in ("mask(half)", "mask(box)", "mask(tensor)"):
        keep = LINEAR[name].spectrum((3, 8, 16), x).known
        assert torch.equal(LINEAR[name].prox(x, 0.0, LINEAR[name](x.flip(2))), torch.where(keep, x.flip(2), x))


def test_compression(x: Tensor) -> None:
    """Twice is once, coarser loses more, a flat grey picture and quality 100 stay; the derivative is that of no rounding."""
    jpeg, soft = build("operator", "jpeg", quality=20), x.clamp(-1, 1)[..., :8]
    assert near(jpeg(jpeg(soft)), jpeg(soft), 1e-9)
    errors = [float((build("operator", "jpeg", quality=q)(soft) - soft).norm()) for q in (5, 20, 50, 90, 100)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 < 0.5 < errors[1]
    assert near(jpeg.pullback(soft, soft.flip(3)), soft.flip(3), 1e-5)  # the colour matrix is printed to six places
    black = -torch.ones(1, 3, 8, 8, dtype=torch.float64)
    assert near(jpeg(black), black, 0.05)


def test_compression_as_pillow_does_it() -> None:
    """The same tables: what Pillow has compressed is as far from it as its own rounding to whole numbers."""
    import io

    from PIL import Image

    from ldm_pipe.image import to_pil, to_tensor

    picture = torch.sin(torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32) * 0.02) * 0.8
    file = io.BytesIO()
    to_pil(picture)[0].save(file, "JPEG", quality=20, subsampling=0)
    theirs = to_tensor([Image.open(file)])
    ours = build("operator", "jpeg", quality=20)(to_tensor(to_pil(picture)))
    assert float((ours.clamp(-1, 1) - theirs).abs().mean()) < 1.0 / 127.5
    assert float((ours.clamp(-1, 1) - theirs).abs().mean()) < 0.2 * float((theirs - picture).abs().mean())


def test_clipping_and_functions(x: Tensor) -> None:
    assert torch.equal(build("operator", "clip")(x), torch.clamp(2 * x, -1, 1))
    cube = Function(lambda z: z**3)
    assert near(cube.pullback(x, x), 3 * x**3)
    z = x.clamp(-0.1, 0.1) + 2
    j = 3 * z**2  # one Gauss-Newton step, by hand
    assert near(cube.prox(z, 0.5, (z + 0.1) ** 3), z + j * ((z + 0.1) ** 3 - z**3) / (j * j + 0.5), 1e-9)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("pool", "pool(4)"),
        (" pool( 2 ) ", "pool(factor=2)"),
        ("grey()", "grey"),
        ("cs(seed=7, ratio=2)", "cs(2,7)"),
        ("jpeg(quality='30')", "jpeg(30)"),
        ("blur_zero(width=2)", "blur_zero(gaussian,2.0)"),
    ],
)
def test_texts_that_mean_the_same(text: str, same: str) -> None:
    assert parse(text) == parse(same)
    assert parse(text) != parse("clip(3)")


def test_a_mask_is_read_from_a_picture(tmp_path: Any, x: Tensor) -> None:
    from PIL import Image

    file = tmp_path / "a, b=c.png"
    Image.fromarray((torch.arange(128).reshape(8, 16) * 2).numpy().astype("uint8")).save(file)
    keep = parse(f"mask('{file}')").spectrum((3, 8, 16), x).known  # type: ignore[attr-defined]
    assert torch.equal(keep[0, 0], torch.arange(128).reshape(8, 16) >= 64)
    with pytest.raises(UsageError, match="16x8, the image 8x8"):
        parse(f"mask('{file}')")(x[..., :8])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not of the form"),
        ("pool(4", "not of the form"),
        ("pool('4)", "not of the form"),
        ("pool(,)", "not of the form"),
        ("pol(4)", "did you mean 'pool'"),
        ("pool(facter=4)", "did you mean 'factor'"),
        ("pool(4, 5)", "takes 1 value"),
        ("pool(4, factor=5)", "got 2"),
        ("cs(4, ratio=2)", "stands twice"),
        ("pool(many)", "takes a whole number"),
        ("pool(0)", "1 or more"),
        ("bicubic(0)", "1 or more"),
        ("jpeg(0)", "quality of 1 to 100"),
        ("blur(gaussien, 3)", "choose from gaussian, uniform"),
        ("cs(0)", "ratio of 1 or more"),
        ("pool(__import__('os'))", "not of the form"),
    ],
)
def test_a_wrong_text_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pool(3)", "multiples of 3, got 8x16"),
        ("bicubic(3)", "multiples of 3"),
        ("cs(3)", "multiple of 3"),
        ("mask(nowhere.png)", "neither half nor box"),
        ("blur(gaussian, 0)", "above 0"),
        ("blur(uniform, 4)", "odd"),
    ],
)
def test_images_that_do_not_fit_are_refused(text: str, words: str, x: Tensor) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)(x)


def test_shapes_that_do_not_fit_are_refused(x: Tensor) -> None:
    wrongs: list[Callable[[], Any]] = [
        lambda: parse("grey")(x[:, :2]),
        lambda: parse("jpeg")(x[:, :1]),
        lambda: parse("jpeg")(x[..., :4]),
        lambda: parse("cs(2)")(x[..., :6]),
        lambda: Matrix(WIDE, (3, 8, 8)),
        lambda: Blur(torch.ones(2, 3))(x),
    ]
    for wrong in wrongs:
        with pytest.raises(UsageError):
            wrong()


def test_every_operator_has_a_name() -> None:
    assert set(registry.KINDS["operator"]) == {"pool", "bicubic", "blur", "blur_zero", "mask", "grey", "cs", "jpeg", "clip"}


@pytest.mark.parametrize("text", ["pool(2)", "blur(gaussian, 1)", "grey", "mask(box)", "clip(0.7)"])
def test_pushing_is_the_adjoint_of_pulling(text: str, x: Tensor) -> None:
    """<J v, u> = <v, J' u>."""
    known: Any = parse(text)
    u = known(x.flip(0)) + 0.3
    there = known.derivative(x)
    assert near(there.value, known(x))
    assert near(there.pull(u), known.pullback(x, u))
    left, right = (there.push(x.flip(2)) * u).sum(), (x.flip(2) * known.pullback(x, u)).sum()
    assert float((left - right).abs()) < 1e-10 * float(left.abs())
    assert float(left.abs()) > 1e-3


class Bent:
    """A decoder that bends, twice as large as what it decodes."""

    channels, factor = 3, 1

    def decode(self, latents: Tensor) -> Tensor:
        return 2 * torch.sin(latents)

    def encode(self, images: Tensor) -> Tensor:
        return torch.asin(images / 2)


def test_the_derivative_through_a_decoder_is_nearly_its_own(x: Tensor) -> None:
    """By a difference as wide as a hundredth of the latents' deviation, for directions of any length."""
    from ldm_pipe.restore.latent import Latent

    for length in (1e-6, 1.0, 1e6):
        v = length * x.flip(3)
        found = Latent(parse("pool(2)"), Bent()).derivative(x).push(v)  # type: ignore[arg-type]
        right = parse("pool(2)")(2 * torch.cos(x) * v)
        assert float((found - right).norm() / right.norm()) < 0.02
    there = Latent(parse("pool(2)"), Bent()).derivative(x)  # type: ignore[arg-type]
    assert bool((there.push(0 * x) == 0).all())
    right = Latent(parse("pool(2)"), Bent()).pullback(x, u := there.value.flip(2))  # type: ignore[arg-type]
    assert near(there.pull(u), right)


def test_a_step_decodes_once_a_round(x: Tensor) -> None:
    """Once for the value and its derivative, once a round, once to see whether the whole step was too far."""
    from ldm_pipe.restore.latent import Latent

    seen: list[int] = []

    class Counted(Bent):
        def decode(self, latents: Tensor) -> Tensor:
            seen.append(1)
            return super().decode(latents)

    pool = parse("pool(2)")
    Latent(pool, Counted(), steps=2).prox(0.1 * x, 0.0, pool(Bent().decode(0.11 * x)))  # type: ignore[arg-type]
    assert len(seen) == 4


def test_a_step_that_would_miss_by_more_is_halved() -> None:
    """Newton's step of atan(z) = 0 runs away from |z| > 1.39: from 3 it is -12.49, too far, as is its half."""
    from ldm_pipe.restore.function import Function

    z = torch.tensor([3.0, 1.0, 0.0, 1e9], dtype=torch.float64).reshape(4, 1, 1, 1)
    found = Function(torch.atan).prox(z, 0.0, torch.zeros(1, 1, 1, 1, dtype=torch.float64)).flatten()
    whole = -torch.atan(z) * (1 + z**2)
    assert float(found[0]) == pytest.approx(3 + float(whole[0]) / 4)
    assert float(found[1]) == pytest.approx(1 + float(whole[1]))
    assert float(found[2]) == 0
    assert float(found[3]) == 1e9  # no sixty-fourth of it helps either: it stays


def test_pulling_back_counts_towards_the_step() -> None:
    """rho |d|^2 is a part of what may not grow: at rho 1e6 hardly anything moves."""
    from ldm_pipe.restore.function import Function

    z = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    moved = Function(torch.atan).prox(z, 1e6, torch.zeros(1, 1, 1, 1, dtype=torch.float64)) - z
    assert float(moved) == pytest.approx(-float(torch.atan(z)) / 10 / 1e6, rel=1e-6)


def test_what_pulls_back_may_be_what_halves_the_step() -> None:
    """From 1.393 the whole step of atan(z) = 0 misses a little less than before, but not by the rho |d|^2 that it costs."""
    from ldm_pipe.restore.function import Function

    z, rho = 1.393, 1e-4
    slope, value = 1 / (1 + z * z), math.atan(z)
    d = -slope * value / (slope**2 + rho)
    assert math.atan(z + d) ** 2 < value**2 < math.atan(z + d) ** 2 + rho * d**2
    found = Function(torch.atan).prox(torch.full((1, 1, 1, 1), z, dtype=torch.float64), rho, torch.zeros(1, 1, 1, 1).double())
    assert float(found) == pytest.approx(z + d / 2)
