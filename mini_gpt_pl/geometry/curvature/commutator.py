r"""The commutator of two gradient steps: what the order of two batches changes.

A step on batch A and one on batch B, of size eta, end in different places by their order. With gradients g and
Hessians H at theta,

    theta_AB - theta_BA = eta^2 (H_B g_A - H_A g_B) + O(eta^3),
    defect D = ||H_B g_A - H_A g_B|| / (||g_A|| ||g_B||).

The bracket H_B g_A - H_A g_B is the Lie bracket of two gradient fields. It is no curvature of the loss surface, and it
vanishes for A = B whatever the curvature.

Two cautions are built in. D has 1/||g|| in it: it rises when gradients vanish, with nothing happening to the curvature.
So it is shown with forms that do not: c = ||bracket|| / sqrt(||g_A|| ||g_B||), c ||theta||^2 and the relative
commutator ||bracket|| / (||H_B g_A|| + ||H_A g_B||). And weights are never subtracted: the difference of two float32
weights is rounding noise when eta ||g|| is small. Brackets come from Hessian-vector products or from differences of
gradients, in the dtype of theta, float64 if possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.vectors.free_weights import Loss

# Rounding of a Hessian-vector product, in units of its length times the dtype's epsilon.
_ROUNDING = 1024.0
_FLOAT32_HALF_ULP = 2.0**-24


class NotTwiceError(UserError):
    """A loss that cannot be differentiated twice."""


@dataclass(frozen=True, eq=False)
class Commutator:
    """Two gradients at one point, g_A and g_B in units of the loss per parameter unit, and H_B g_A and H_A g_B.

    `noise` is the length below which the bracket is rounding.
    """

    grad_a: Float[Tensor, " D"]
    grad_b: Float[Tensor, " D"]
    b_along_a: Float[Tensor, " D"]
    a_along_b: Float[Tensor, " D"]
    noise: Float[Tensor, ""]

    @cached_property
    def bracket(self) -> Float[Tensor, " D"]:
        """H_B g_A - H_A g_B; its sign changes when A and B change places."""
        return self.b_along_a - self.a_along_b


def gradient(loss: Loss, theta: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Gradient of a loss at some weights."""
    point = theta.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(point), point)[0]


def by_hessian(loss_a: Loss, loss_b: Loss, theta: Float[Tensor, " D"]) -> Commutator:
    """Commutator from two Hessian-vector products (double backward): exact to rounding.

    Raises:
        NotTwiceError: A part of the loss has no second derivative (a fused kernel, cuDNN's recurrent networks).
    """
    try:
        field_a, field_b = _Field.of(loss_a, theta), _Field.of(loss_b, theta)
        grad_a, grad_b = field_a.grad.detach(), field_b.grad.detach()
        b_along_a, a_along_b = field_b.curved(grad_a), field_a.curved(grad_b)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        loss_a(theta)  # raises an error of the loss itself as it is
        reason = str(error).splitlines()[0]
        raise NotTwiceError(f"the loss cannot be differentiated twice ({reason})") from None
    noise = _ROUNDING * _eps(theta) * (_length(b_along_a) + _length(a_along_b))
    return Commutator(grad_a, grad_b, b_along_a, a_along_b, noise)


def by_differences(loss_a: Loss, loss_b: Loss, theta: Float[Tensor, " D"]) -> Commutator:
    """Commutator from symmetric gradient differences: for losses without a second derivative.

    H v is taken as (g(theta + h v) - g(theta - h v)) / 2h. The best h ||v|| is the cube root of the epsilon times
    the length over which the gradient changes by itself, ||g|| ||v|| / ||H v||, which a first, one-sided difference
    finds. Eight gradients.
    """
    grad_a, grad_b = gradient(loss_a, theta), gradient(loss_b, theta)
    b_along_a, spoilt_b = _slope(loss_b, theta, grad_b, grad_a)
    a_along_b, spoilt_a = _slope(loss_a, theta, grad_a, grad_b)
    lengths = _ROUNDING * (_length(b_along_a) + _length(a_along_b))
    return Commutator(grad_a, grad_b, b_along_a, a_along_b, _eps(theta) * lengths + spoilt_a + spoilt_b)


def finite(
    at_theta: Commutator, loss_a: Loss, loss_b: Loss, theta: Float[Tensor, " D"], eta: float
) -> Float[Tensor, " D"]:
    """(theta_AB - theta_BA) / eta^2 of two steps of finite size, exactly, and without subtracting weights.

    delta / eta = [g_A(theta - eta g_B) - g_A(theta)] - [g_B(theta - eta g_A) - g_B(theta)]

    The gradients at theta are those of the commutator, whose bracket is the limit as eta tends to 0.
    """
    after_b = gradient(loss_a, theta - eta * at_theta.grad_b) - at_theta.grad_a
    after_a = gradient(loss_b, theta - eta * at_theta.grad_a) - at_theta.grad_b
    return (after_b - after_a) / eta


@dataclass(frozen=True, eq=False)
class Lengths:
    """Lengths of K commutators at one point, and everything that follows from them alone.

    A sample whose bracket is below rounding, or whose gradient vanishes, has no defect: it is NaN, never 0.

    Args:
        norm_a: ||g_A|| of each sample.
        norm_b: ||g_B||.
        inner: <g_A, g_B>.
        bracket: ||H_B g_A - H_A g_B||.
        pulled: ||H_B g_A|| + ||H_A g_B||, the longest that the bracket could be.
        noise: Length below which the bracket is rounding.
        stepped: ||theta_AB - theta_BA|| / eta^2 of steps of size eta.
        weights: ||theta||.
        eta: Step size.
    """

    norm_a: Float[Tensor, " K"]
    norm_b: Float[Tensor, " K"]
    inner: Float[Tensor, " K"]
    bracket: Float[Tensor, " K"]
    pulled: Float[Tensor, " K"]
    noise: Float[Tensor, " K"]
    stepped: Float[Tensor, " K"]
    weights: Float[Tensor, " K"]
    eta: float

    @classmethod
    def of(cls, sample: Commutator, stepped: Float[Tensor, " D"], theta: Float[Tensor, " D"], eta: float) -> Lengths:
        """Measure one sample, and its steps of `finite` size eta, on its device."""
        vectors = (sample.grad_a, sample.grad_b, sample.bracket, stepped, theta)
        a, b, bracket, moved, weights = (_length(vector)[None] for vector in vectors)
        pulled = (_length(sample.b_along_a) + _length(sample.a_along_b))[None]
        inner = torch.dot(sample.grad_a.double(), sample.grad_b.double())[None]
        return cls(a, b, inner, bracket, pulled, sample.noise.double()[None], moved, weights, eta)

    @classmethod
    def stack(cls, samples: Sequence[Lengths]) -> Lengths:
        """Put samples of one point together, on the host, in one transfer."""
        names = [field.name for field in fields(cls) if field.name != "eta"]
        columns = torch.stack([torch.cat([getattr(sample, name) for sample in samples]) for name in names])
        lengths: dict[str, Any] = dict(zip(names, columns.cpu(), strict=True))
        return replace(samples[0], **lengths)

    @property
    def resolved(self) -> Float[Tensor, " K"]:
        """1 where the bracket is more than this arithmetic's rounding, else 0; NaN gradients are not resolved."""
        return ((self.bracket > self.noise) & (self._product > 0)).to(torch.float64)

    @property
    def _product(self) -> Float[Tensor, " K"]:
        return self.norm_a * self.norm_b

    def _known(self, values: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        return torch.where(self.resolved > 0, values, torch.nan)

    @property
    def defect(self) -> Float[Tensor, " K"]:
        """D = ||bracket|| / (||g_A|| ||g_B||), to leading order in eta."""
        return self._known(self.bracket / self._product)

    @property
    def defect_eta(self) -> Float[Tensor, " K"]:
        """||theta_AB - theta_BA|| / (||eta g_A|| ||eta g_B||) of steps of size eta: the published quantity, exact."""
        return self._known(self.stepped / self._product)

    @property
    def scaled(self) -> Float[Tensor, " K"]:
        """Bracket in units of the Hessian, without 1/||g||: c = ||bracket|| / sqrt(||g_A|| ||g_B||)."""
        return self._known(self.bracket / self._product.sqrt())

    @property
    def scale_free(self) -> Float[Tensor, " K"]:
        """The same times ||theta||^2, which decay alone leaves as it is in a network blind to its weights' length."""
        return self.scaled * self.weights.square()

    @property
    def relative(self) -> Float[Tensor, " K"]:
        """||bracket|| / (||H_B g_A|| + ||H_A g_B||), between 0 and 1; orthogonal parts of one length give 0.71.

        Neither the scale of the gradients nor that of the curvature is in it.
        """
        return self._known(self.bracket / self.pulled)

    @property
    def cosine(self) -> Float[Tensor, " K"]:
        """cos(g_A, g_B)."""
        return torch.where(self._product > 0, self.inner / self._product, torch.nan)

    @property
    def step_resolution(self) -> Float[Tensor, " K"]:
        """Shorter step, eta min(||g_A||, ||g_B||), over 2^-24 ||theta||: below 1, float32 weights do not see it."""
        return self.eta * torch.minimum(self.norm_a, self.norm_b) / (_FLOAT32_HALF_ULP * self.weights)

    @property
    def float32_signal(self) -> Float[Tensor, " K"]:
        """||theta_AB - theta_BA|| over 2^-24 ||theta||: below 1, a difference of float32 weights is rounding."""
        return self.eta**2 * self.stepped / (_FLOAT32_HALF_ULP * self.weights)


def median(values: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Median of the samples that are not NaN; the mean of the middle two where their number is even."""
    return torch.nanquantile(values, 0.5)


def quartiles(values: Float[Tensor, " K"]) -> Float[Tensor, " 2"]:
    """Lower and upper quartile of the samples that are not NaN, by linear interpolation."""
    return torch.nanquantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))


@dataclass(frozen=True, eq=False)
class _Field:
    """A gradient with its graph: of the loss times a factor 1, by the weights."""

    grad: Tensor
    point: Tensor
    one: Tensor

    @classmethod
    def of(cls, loss: Loss, theta: Tensor) -> _Field:
        point = theta.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(point)
            one = torch.ones_like(value).requires_grad_()
            (grad,) = torch.autograd.grad(value, point, one, create_graph=True)
        return cls(grad, point, one)

    def curved(self, along: Tensor) -> Tensor:
        """H v by a second backward; zero where the gradient is constant.

        An operation whose derivative has none of its own cuts the graph, and torch may say nothing: its part of H v
        would be missing. Then the way back to the factor is cut too, and <g, v>, the derivative by it, comes out wrong.
        """
        product, inner = torch.autograd.grad(self.grad, (self.point, self.one), along, allow_unused=True)
        grad = self.grad.detach()
        expected, slack = torch.dot(grad, along), _eps(along) ** 0.5 * _length(grad) * _length(along)
        if inner is None or bool((inner - expected).abs() > slack):  # False for NaN, which is reported as such
            raise RuntimeError("a part of it has a first derivative only, or is computed in a narrower dtype")
        return torch.zeros_like(along) if product is None else product.detach()


def _slope(loss: Loss, theta: Tensor, grad: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """H v, v being `along`, by symmetric differences of gradients, and how much of it may be rounding."""
    tiny = torch.finfo(torch.float64).tiny
    length, reach, eps = _length(along).clamp_min(tiny), 1.0 + _length(theta), _eps(theta)
    first = (eps**0.5 * reach / length).to(theta.dtype)
    rough = _length(gradient(loss, theta + first * along) - grad) / first  # about ||H v||
    own = _length(grad) * length / rough.clamp_min(tiny)
    step = (eps ** (1 / 3) * torch.minimum(own, reach) / length).clamp_min(tiny)
    move = step.to(theta.dtype) * along
    difference = gradient(loss, theta + move) - gradient(loss, theta - move)
    return difference / (2 * step).to(theta.dtype), eps * _length(grad) / step


def _length(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dtype=torch.float64)


def _eps(theta: Tensor) -> float:
    return torch.finfo(theta.dtype).eps
