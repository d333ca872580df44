r"""Fisher matrices through a handful of gradients: scalars per gradient, and an M x M Gram where a spectrum is wanted.

For gradients g_1 .. g_M let F = (1/M) sum_i g_i g_i'. Nothing here forms F or keeps the M x D matrix of gradients: one
pass leaves ||g_i||^2 and <g_i, v>, which give every Rayleigh quotient, the trace and the anisotropy with their errors.
Which Fisher F estimates depends on the gradients alone, and the three differ:

* batch-mean second moment: g_i of mini-batch losses. F = mu mu' + Sigma / B depends on the batch size B. This is what
  the paper calls the empirical Fisher;
* per-sample empirical Fisher: g_i of the losses of single samples with their true labels;
* Monte-Carlo true Fisher: g_i = sqrt(n) times the gradient of the mean negative log-likelihood of n labels drawn from
  the model itself. Scores of independent draws are uncorrelated with mean zero, so E[g g'] is the Fisher per label, and
  for a softmax it equals the Gauss-Newton matrix of the mean loss (Martens 2014, section 9).

Coordinates cannot be mixed up: gradients and directions are `Vector`s, and those of different selections refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry import pca
from mini_gpt_pl.geometry.alignment import with_total
from mini_gpt_pl.geometry.selection import ParameterSelection, Vector
from mini_gpt_pl.geometry.trajectory import Trajectory

# Columns of the held gradients converted to float64 at a time.
_CHUNK = 1 << 18

BACKBONE = "backbone"


class Estimated(NamedTuple):
    """A mean over gradients and its standard error, per group and, last, for the whole selection.

    Attributes:
        value: The estimate.
        error: Its standard error over the M gradients.
    """

    value: Float[Tensor, " G1"]
    error: Float[Tensor, " G1"]


# ----------------------------------------------------------------------------------------------------- directions


@dataclass(frozen=True)
class Axis:
    """A direction to measure along: one for each group by itself, and one for the whole selection.

    Args:
        own: The groups' directions, end to end; of any lengths.
        whole: The whole selection's direction; of any length.
        lengths: Lengths of the groups' directions, then of the whole's, float64.
    """

    own: Vector
    whole: Vector
    lengths: Float[Tensor, " G1"]

    @classmethod
    def of(cls, own: Vector, whole: Vector) -> Axis:
        """Measure the lengths.

        Raises:
            FingerprintError: The two order their coordinates differently.
        """
        own.selection.require(whole.selection.fingerprint)
        squares = torch.cat([own.dots(own), whole.dots(whole).sum()[None]])
        return cls(own, whole, squares.sqrt())

    def project(self, vector: Vector) -> Float[Tensor, " G1"]:
        """Coordinates of a vector along the unit directions; zero along one that vanishes.

        Raises:
            FingerprintError: The vector orders its coordinates differently.
        """
        own = vector.dots(self.own)
        total = own.sum() if self.whole is self.own else vector.dots(self.whole).sum()
        inner = torch.cat([own, total[None]])
        return torch.where(self.lengths > 0, inner / self.lengths, 0.0)


def path_coefficients(
    trajectory: Trajectory, segments: Mapping[str, tuple[int, int]]
) -> dict[str, Float[Tensor, "G1 n"]]:
    """Name the directions that the snapshots so far offer, as coefficients over (theta_0, d_1, ..., d_T).

    Args:
        trajectory: The snapshots up to now.
        segments: Displacements theta(second step) - theta(first step) by name, such as a switch from peak to trough;
            one whose snapshots have not both been taken is left out.

    Returns:
        `backbone`, `pc2` (where the path has a second component in every group), `theta0` (the initial weights, with
        which weight decay aligns any backbone) and the segments: a row per group, then the whole's.
    """
    n = len(trajectory)
    if n < 2:
        return {}
    rows = pca.drifts(n)[1:]
    grams = [*(trajectory.gram(group) for group in trajectory.groups), trajectory.gram()]
    if min(float(pca.norms(gram, rows).max()) for gram in grams) == 0.0:
        return {}  # nothing has moved yet
    parts = [pca.pca(gram, rows).directions for gram in grams]
    found = {BACKBONE: torch.stack([part[0] for part in parts])}
    if min(len(part) for part in parts) > 1:
        found["pc2"] = torch.stack([part[1] for part in parts])
    found["theta0"] = pca.theta0(n).expand(len(grams), n)
    path = pca.drifts(n)
    for name, (first, last) in segments.items():
        if first in trajectory.steps and last in trajectory.steps:
            line = path[trajectory.steps.index(last)] - path[trajectory.steps.index(first)]
            found[name] = line.expand(len(grams), n)
    return found


class RandomDirections:
    """K Gaussian directions made orthogonal to an axis: the paper's denominator of the anisotropy.

    They are drawn again for every gradient rather than stored, so they take D values and not K x D, and K draws of D
    numbers for each gradient. `anisotropy` knows their mean exactly and costs nothing: this is for comparison.

    Args:
        axis: What they are orthogonal to, group by group and as a whole.
        count: K.
        seed: Of the generators; direction k is a function of (seed, k) on one kind of device.
    """

    def __init__(self, axis: Axis, count: int, seed: int = 0) -> None:
        self.axis = axis
        self.count = count
        self.seed = seed
        self._known: list[tuple[Float[Tensor, " G1"], Float[Tensor, " G1"]]] = []

    def project(self, vector: Vector, along: Float[Tensor, " G1"]) -> Float[Tensor, "K G1"]:
        """Coordinates of a vector along each of the unit directions.

        Args:
            vector: A gradient.
            along: Its coordinates along the axis.
        """
        found = []
        for k in range(self.count):
            draw = self._draw(k, vector)
            if k == len(self._known):
                self._known.append((self.axis.project(draw), with_total(draw.dots(draw))))
            shared, square = self._known[k]
            across = (square - shared.square()).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
            found.append((with_total(vector.dots(draw)) - shared * along) / across)
        return torch.stack(found)

    def _draw(self, k: int, like: Vector) -> Vector:
        generator = torch.Generator(like.values.device).manual_seed((self.seed << 16) + k)
        return Vector(torch.randn(like.values.shape, generator=generator, device=like.values.device), like.selection)


# ---------------------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True)
class Survey:
    """What M gradients leave behind, in float64; column g is group g, the last one the whole selection.

    Args:
        squares: ||g_i||^2.
        projections: <g_i, v> of each named unit direction.
        random: <g_i, w_k> of random directions, if they were asked for.
        grams: <g_i, g_j> per group, if they were asked for; they add up to the whole's.
    """

    squares: Float[Tensor, "M G1"]
    projections: Mapping[str, Float[Tensor, "M G1"]]
    random: Float[Tensor, "M K G1"] | None = None
    grams: Float[Tensor, "G M M"] | None = None

    def cpu(self) -> Survey:
        """Move everything to the host, in one transfer."""
        tensors = [self.squares, *self.projections.values()]
        tensors += [t for t in (self.random, self.grams) if t is not None]
        flat = torch.cat([t.reshape(-1) for t in tensors]).cpu()
        parts = [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
        names = list(self.projections)
        rest = parts[1 + len(names) :]
        return replace(
            self,
            squares=parts[0],
            projections=dict(zip(names, parts[1:], strict=False)),
            random=None if self.random is None else rest[0],
            grams=None if self.grams is None else rest[-1],
        )


def survey(
    gradient: Callable[[int], Vector],
    count: int,
    axes: Mapping[str, Axis],
    *,
    block: int = 0,
    random: RandomDirections | None = None,
) -> Survey:
    """Stream M gradients and keep scalars of them.

    Without a Gram each gradient is computed once and D values are held. The Gram needs every pair: `block` gradients
    are held while the ones after them are computed again, which takes M (M/block + 1) / 2 gradients in all and
    (block + 1) D values. block = M computes each once and holds all of M x D; for M = 32, block = 8 takes 80.

    Args:
        gradient: Gives g_i for i in 0 .. M-1, the same whenever it is asked.
        count: M.
        axes: Directions to project on.
        block: Gradients held at a time; 0 leaves the Gram out.
        random: Random directions to project on.

    Raises:
        ValueError: There are fewer than two gradients.
        FingerprintError: A gradient and a direction order their coordinates differently.
    """
    if count < 2:
        raise ValueError(f"a standard error takes at least two gradients, got {count}")
    squares, projections, drawn = [], {name: [] for name in axes}, []  # type: ignore[var-annotated]
    gram: Float[Tensor, "G M M"] | None = None
    for begin in range(0, count, block or count):
        held: list[Vector] = []
        for i in range(begin, count):
            g = gradient(i)
            if begin == 0:
                squares.append(with_total(g.dots(g)))
                for name, axis in axes.items():
                    projections[name].append(axis.project(g))
                if random is not None:
                    drawn.append(random.project(g, random.axis.project(g)))
            if not block:
                continue
            if len(held) < block:
                held.append(g)
            if gram is None:
                gram = torch.zeros(len(g.selection.groups), count, count, dtype=torch.float64, device=g.values.device)
            products = _dots(held, g)
            gram[:, begin : begin + len(held), i] = products
            gram[:, i, begin : begin + len(held)] = products
    return Survey(
        torch.stack(squares),
        {name: torch.stack(found) for name, found in projections.items()},
        torch.stack(drawn) if drawn else None,
        gram,
    )


def gradient_of_rows(matrix: Float[Tensor, "M D"], selection: ParameterSelection) -> Callable[[int], Vector]:
    """Serve the rows of a dense matrix as gradients, for `survey`."""
    return lambda i: Vector(matrix[i], selection)


# ------------------------------------------------------------------------------------------------------ statistics


def mean_of(values: Float[Tensor, "M G1"]) -> Estimated:
    """Mean over gradients, with sd / sqrt(M); one gradient has no error, NaN."""
    error = values.std(0) if len(values) > 1 else torch.full_like(values[0], float("nan"))
    return Estimated(values.mean(0), error / math.sqrt(len(values)))


def rayleigh(projections: Float[Tensor, "M G1"]) -> Estimated:
    """Rayleigh quotient q(v) = v'Fv = mean <g_i, v>^2 along unit directions."""
    return mean_of(projections.square())


def trace(found: Survey) -> Estimated:
    """Trace of F, the mean of ||g_i||^2."""
    return mean_of(found.squares)


def anisotropy(quotients: Float[Tensor, "M G1"], squares: Float[Tensor, "M G1"], dims: Sequence[int]) -> Estimated:
    """q(v) over the mean Rayleigh quotient of all directions across v: 1 where F is isotropic.

    For w uniform on the unit sphere orthogonal to v, E[w'Fw] = (tr F - q(v)) / (D - 1) exactly, so no random direction
    has to be drawn. The error is the jackknife's over gradients. NaN where D is 1 or no gradient is left across v.

    Args:
        quotients: <g_i, v>^2.
        squares: ||g_i||^2.
        dims: D of each group, then of the whole.
    """
    others = torch.tensor(dims, dtype=squares.dtype, device=squares.device) - 1

    def ratio(along: Float[Tensor, "*batch G1"], total: Float[Tensor, "*batch G1"]) -> Float[Tensor, "*batch G1"]:
        across = total - along
        # Below the rounding of the difference there is nothing across v that could be told from zero.
        visible = (others > 0) & (across > 1e-12 * total.abs())
        return torch.where(visible, along * others / across, float("nan"))

    replicates = ratio(_leave_one_out(quotients), _leave_one_out(squares))
    return Estimated(ratio(quotients.mean(0), squares.mean(0)), _jackknife(replicates))


def sampled_anisotropy(projections: Float[Tensor, "M G1"], random: Float[Tensor, "M K G1"]) -> Float[Tensor, " G1"]:
    """q(v) over the mean Rayleigh quotient of K random directions across v, the paper's estimate of `anisotropy`."""
    return projections.square().mean(0) / random.square().mean((0, 1))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of F and its eigenvectors as combinations u_k = sum_i w_ki g_i / sqrt(M lambda_k).

    Args:
        eigenvalues: The M largest of F, descending; the other D - M are zero.
        modes: Row k holds w_k, the unit eigenvectors of the Gram matrix.
    """

    eigenvalues: Float[Tensor, " M"]
    modes: Float[Tensor, "M M"]

    def overlaps(self, projections: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
        """|<u_k, v>| from <g_i, v> alone: no vector of D values is formed. Zero where lambda_k vanishes."""
        lengths = (len(self.eigenvalues) * self.eigenvalues).sqrt()
        seen = self.eigenvalues > len(self.eigenvalues) * torch.finfo(torch.float64).eps * self.eigenvalues[0]
        return torch.where(seen, (self.modes @ projections).abs() / lengths, 0.0)


def spectrum(gram: Float[Tensor, "M M"]) -> Spectrum:
    """Eigenvalues of F through its Gram: G'G/M and GG'/M share them.

    Args:
        gram: <g_i, g_j> of one group, or summed over groups.
    """
    energy, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return Spectrum(energy.flip(0).clamp_min(0.0) / len(gram), vectors.flip(1).T)


class Leading(NamedTuple):
    """The first mode of F.

    Attributes:
        value: lambda_1.
        value_error: Jackknife standard error over gradients.
        overlap: |<u_1, v>|.
        overlap_error: Jackknife standard error over gradients.
    """

    value: float
    value_error: float
    overlap: float
    overlap_error: float


def leading(gram: Float[Tensor, "M M"], projections: Float[Tensor, " M"]) -> Leading:
    """Largest eigenvalue and its eigenvector's overlap with v; the errors take M eigenproblems of size M - 1."""

    def first(keep: Tensor) -> Float[Tensor, " k"]:
        part = spectrum(gram[keep][:, keep])
        return torch.stack([part.eigenvalues[0], part.overlaps(projections[keep])[0]])

    everything = torch.arange(len(gram))
    value, overlap = first(everything).tolist()
    value_error, overlap_error = _jackknife(torch.stack([first(everything[everything != i]) for i in everything]))
    return Leading(value, float(value_error), overlap, float(overlap_error))


def mean_gradient_share(gram: Float[Tensor, "M M"]) -> float:
    """Unbiased share of ||mu||^2 in tr F: how much of a second moment is the mean gradient alone.

    ||mu||^2 is the mean of <g_i, g_j> over pairs i != j, so it can come out negative where it is small.
    """
    diagonal = gram.diagonal().sum()
    count = len(gram)
    return float((gram.sum() - diagonal) / (count - 1) / diagonal)


class Moments(NamedTuple):
    """A second moment taken apart: E[x^2] at batch size B is mean + noise / B.

    Attributes:
        mean: Square of the mean: ||mu||^2, or <mu, v>^2.
        noise: Variance of a single sample: tr Sigma, or v' Sigma v.
    """

    mean: Float[Tensor, "*shape"]
    noise: Float[Tensor, "*shape"]

    @property
    def per_sample(self) -> Float[Tensor, "*shape"]:
        """The second moment at batch size 1: trace, or Rayleigh quotient, of the per-sample empirical Fisher."""
        return self.mean + self.noise


def split_moments(
    small: Float[Tensor, "*shape"], large: Float[Tensor, "*shape"], small_size: int | float, large_size: int | float
) -> Moments:
    """Solve E[x_b^2] = mean + noise / b at two batch sizes (McCandlish et al. 2018, appendix A).

    Both parts are unbiased, so either can come out negative where it is small.

    Args:
        small: Second moment of gradients of small batches.
        large: Second moment of gradients of large batches.
        small_size: Samples in a small batch.
        large_size: Samples in a large batch.

    Raises:
        ValueError: The sizes are equal, or not in this order.
    """
    if not 0 < small_size < large_size:
        raise ValueError(f"two batch sizes, the smaller one first, are needed, got {small_size} and {large_size}")
    noise = (small - large) / (1.0 / small_size - 1.0 / large_size)
    return Moments(large - noise / large_size, noise)


# ------------------------------------------------------------------------------------------------------- summation


def _leave_one_out(values: Float[Tensor, "M G1"]) -> Float[Tensor, "M G1"]:
    """Means over all gradients but one."""
    return (values.sum(0) - values) / (len(values) - 1)


def _jackknife(replicates: Float[Tensor, "M k"]) -> Float[Tensor, " k"]:
    """Standard error from the values without each gradient in turn."""
    count = len(replicates)
    return ((count - 1) / count * (replicates - replicates.mean(0)).square().sum(0)).sqrt()


def _dots(held: Iterable[Vector], new: Vector) -> Float[Tensor, "G b"]:
    """Inner products of one vector with several, per group, in float64 and in chunks."""
    rows = list(held)
    for row in rows:
        row.selection.require(new.selection.fingerprint)
    found = []
    for span in new.selection.slices:
        total = torch.zeros(len(rows), dtype=torch.float64, device=new.values.device)
        for lo in range(span.start, span.stop, _CHUNK):
            hi = min(lo + _CHUNK, span.stop)
            total += torch.stack([row.values[lo:hi].double() for row in rows]) @ new.values[lo:hi].double()
        found.append(total)
    return new.selection.total(torch.stack(found))
