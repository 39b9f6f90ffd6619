"""What restoration methods share: operators with their proximal maps, a measurement, steps of the score.

An operator A takes images [B,C,H,W] to measurements [B,...]. `Linear` ones know their singular value decomposition and with
it everything else in closed form; for the others autograd does what can be done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm_pipe.errors import UsageError
from ldm_pipe.level import Level
from ldm_pipe.model import Denoiser, Estimate
from ldm_pipe.noise import StepNoise
from ldm_pipe.restore.spectrum import Spectrum


class Derivative(NamedTuple):
    """Of an operator at images x [B,C,H,W]: what it measures, [B,...], v -> J v of v [B,C,H,W], and u -> J' u of u [B,...]."""

    value: Tensor
    push: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor], Tensor]


class Operator:
    """Base of the operators: frozen dataclasses with a differentiable `__call__`."""

    def __call__(self, x: Tensor) -> Tensor:
        """The measurement of images [B,C,H,W] without its noise, [B,...]."""
        raise TypeError(f"{type(self).__name__} measures nothing")

    def pullback(self, x: Tensor, v: Tensor) -> Tensor:
        """J(x)' v, where J is the derivative at x [B,C,H,W]: of a linear operator the adjoint of v [B,...]."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self(leaf), leaf, v)[0]

    def derivative(self, x: Tensor) -> Derivative:
        """A(x) and its derivative at x [B,C,H,W], to be used several times."""
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
            out, pull = torch.func.vjp(self, x)[:2]  # pull(u) = (J'u,) is linear, so its own derivative is J

        def push(v: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                pushed: Tensor = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(out))[1](v)[0]
            return pushed

        return Derivative(out, push, lambda u: pull(u)[0])

    def prox(self, z: Tensor, rho: float, y: Tensor) -> Tensor:
        """argmin over x of |y - A x|^2 + rho |x - z|^2; at rho = 0 the x nearest to z that fits y best. [B,C,H,W].

        Linear operators give it exactly. The others give one Gauss-Newton step from z, solved by conjugate gradients
        (`gauss_newton`), which is exact too where A is affine.
        """
        return gauss_newton(self, z, rho, y)

    def guess(self, like: Tensor, y: Tensor, deviation: float = 0.0) -> Tensor:
        """A first estimate of the images that y [B,...] was measured of, [B,C,H,W] as `like`: the smallest that fits, A+ y, or
        as well as the deviation of the noise in y allows where images have variance 1."""
        return self.prox(torch.zeros_like(like), deviation**2, y)


class Linear(Operator):
    """Base of the linear operators, which are told by their spectrum; A, A', A+ and prox follow from it."""

    def spectrum(self, shape: tuple[int, ...], like: Tensor) -> Spectrum:
        """The decomposition on images of shape (C, H, W), in the dtype and on the device of `like`."""
        raise TypeError(f"{type(self).__name__} has no spectrum")

    def image(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, H, W) of the images whose measurements have `shape` (without B)."""
        return shape

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        a = self.spectrum(tuple(x.shape[1:]), x)
        return a.u(a.s * a.vt(x))

    def derivative(self, x: Tensor) -> Derivative:
        """A x, v -> A v and u -> A' u."""
        return Derivative(self(x), self, self.adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """A' y, [B,C,H,W]."""
        a = self.spectrum(self.image(tuple(y.shape[1:])), y)
        return a.v(a.s * a.ut(y))

    def pinv(self, y: Tensor) -> Tensor:
        """A+ y, the smallest image that fits y best, [B,C,H,W]."""
        a = self.spectrum(self.image(tuple(y.shape[1:])), y)
        return a.v(a.measured(y))

    def prox(self, z: Tensor, rho: float, y: Tensor) -> Tensor:
        """(A'A + rho)^-1 (A'y + rho z); at rho = 0 z + A+ (y - A z)."""
        a = self.spectrum(tuple(z.shape[1:]), z)
        c = a.vt(z)
        return a.v(torch.where(a.known, (a.s * a.ut(y) + rho * c) / (a.safe**2 + rho), c))


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = operator(x0) + deviation * noise. y: [B,...], or [1,...] for all images.

    deviation: that of the noise, for images in -1..1: twice the number that a paper quotes for images in 0..1.
    """

    operator: Operator
    y: Tensor
    deviation: float = 0.0

    @property
    def linear(self) -> Linear:
        """The operator, for methods that need its spectrum. Raises UsageError where there is none."""
        if not isinstance(self.operator, Linear):
            what = type(self.operator).__name__
            raise UsageError(f"{what} has no singular values, which this method needs; choose ddnm, diffpir, dps or reddiff")
        return self.operator

    def noised(self, level: Level, noise: Tensor) -> Tensor:
        """The measurement of the unknown image's x at a level, alpha y + sigma A noise (linear operators only)."""
        return level.mix(self.y, self.linear(noise))

    def merged(self, x: Tensor, level: Level, noise: StepNoise) -> Tensor:
        """x at a level with what A sees of it replaced by the data noised to that level (linear operators only)."""
        seen = self.noised(level, noise("data")) if level.sigma else level.alpha * self.y
        return self.linear.prox(x, 0.0, seen)

    def misfit(self, x0: Tensor) -> Tensor:
        """y - A x0, [B,...]."""
        return self.y - self.operator(x0)


def norm(t: Tensor) -> Tensor:
    """The Euclidean norm of every sample, [B]: data of different shapes go with each other (else see `samplewise`)."""
    return t.flatten(1).norm(dim=1)


def square(t: Tensor) -> Tensor:
    """Its square, [B], which has a derivative at 0."""
    return t.flatten(1).square().sum(1)


def shifted(estimate: Estimate, score: Tensor, x: Tensor, level: Level) -> Estimate:
    """The estimate under another score, by Tweedie's formula: x0 + (sigma^2 / alpha) score; the noise follows.

    score: what is added to the gradient of log p(x), [B,C,H,W]. At alpha = 0 x says nothing of x0: no change.
    """
    if level.alpha == 0:
        return estimate
    return estimate.with_x0(lambda x0: x0 + level.sigma**2 / level.alpha * score, x, level)


def ancestral(x0: Tensor, x: Tensor, here: Level, there: Level) -> tuple[Tensor, float]:
    """Mean [B,C,H,W] and variance of q(x_s | x_t, x0), what ancestral sampling draws from; alpha_s x0 and 0 at sigma_s = 0."""
    if there.sigma == 0:
        return there.alpha * x0, 0.0
    r = here.alpha / there.alpha
    b = here.sigma**2 - (r * there.sigma) ** 2
    mean = (there.alpha * b * x0 + r * there.sigma**2 * x) / here.sigma**2
    return mean, float(b * there.sigma**2 / here.sigma**2)


def answered(denoise: Denoiser, x: Tensor, estimate: Estimate) -> Denoiser:
    """The denoiser with the estimate of this very x known already, so that a wrapped sampler does not ask a second time."""
    known = Estimate(*(t if t is None else t.detach() for t in estimate))  # type: ignore[arg-type]
    return lambda other, level: known if other is x else denoise(other, level)


def through(denoise: Denoiser, x: Tensor, level: Level, loss: Callable[[Tensor], Tensor]) -> tuple[Denoiser, Tensor]:
    """(the denoiser with x answered, the gradient with respect to x of loss(x0(x)), through the network).

    loss: x0 [B,C,H,W] -> one number for every sample, [B]. Works inside no_grad.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        estimate = denoise(leaf, level)
        gradient = torch.autograd.grad(loss(estimate.x0).sum(), leaf)[0]
    return answered(denoise, x, estimate), gradient


def gauss_newton(operator: Operator, z: Tensor, rho: float, y: Tensor, steps: int = 50) -> Tensor:
    """z + argmin over d of |y - A(z) - J d|^2 + rho |d|^2, J the derivative of A at z; the smallest such d at rho = 0.

    Conjugate gradients for least squares, every sample on its own (Methods of Conjugate Gradients for Solving Linear Systems,
    Hestenes and Stiefel 1952, J. Res. NBS 49, section 10), until the gradient has fallen by the rounding or after `steps`.
    Where A bends so much that the whole of d would make |y - A(z + d)|^2 + rho |d|^2 larger, d is halved until it does not.
    """
    out, push, pull = operator.derivative(z)
    r, d = y - out, torch.zeros_like(z)
    s = p = pull(r)
    gamma = start = square(s)
    for left in reversed(range(steps)):
        q = push(p)
        a = gamma / (square(q) + rho * square(p)).clamp(min=torch.finfo(z.dtype).tiny)
        d, r = d + _each(a, p), r - _each(a, q)
        if not left:
            break
        s = pull(r) - rho * d
        gamma, last = square(s), gamma
        if bool((gamma <= torch.finfo(z.dtype).eps ** 2 * start).all()):
            break
        p = s + _each(gamma / last.clamp(min=torch.finfo(z.dtype).tiny), p)
    return z + _each(_share(operator, z, d, rho, y, square(y - out)), d)


def _share(operator: Operator, z: Tensor, d: Tensor, rho: float, y: Tensor, before: Tensor) -> Tensor:
    """How much of d to go, [B]: 1, 1/2, ... 1/64, the first that leaves the objective no larger than `before`, else 0."""
    share, slack = torch.ones_like(before), 1 + 1e3 * torch.finfo(z.dtype).eps  # rounding is no reason to go less far
    for _ in range(7):
        after = square(y - operator(z + _each(share, d))) + rho * square(_each(share, d))
        worse = ~(after <= slack * before + torch.finfo(z.dtype).eps)
        if not bool(worse.any()):
            return share
        share = torch.where(worse, share / 2, share)
    return torch.where(worse, 0.0, share)


def _each(a: Tensor, t: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (t.ndim - 1)) * t
