r"""Fisher matrices through a handful of gradients: scalars per gradient, and an M x M Gram where a spectrum is wanted.

For gradients g_1 .. g_M let F = (1/M) sum_i g_i g_i'. Nothing here forms F, nor need all gradients
be held at a time: ||g_i||^2 and <g_i, v> give every Rayleigh quotient, the trace and the anisotropy with their errors.
Which Fisher F estimates depends on the gradients alone, and the three differ:

* batch-mean second moment: g_i of mini-batch losses. F = mu mu' + Sigma / B depends on the batch size B. This is what
  arXiv 2602.23696 calls the empirical Fisher;
* per-sample empirical Fisher: g_i of the losses of single samples with their true labels;
* Monte-Carlo true Fisher: g_i = sqrt(n) times the gradient of the mean negative log-likelihood of n labels drawn from
  the model itself. Scores of independent draws are uncorrelated with mean zero, so E[g g'] is the Fisher per label, and
  for a softmax it equals the Gauss-Newton matrix of the mean loss (Martens 2014, section 9).

Coordinates cannot be mixed up: gradients and directions are `Vector`s, and those of different selections refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from mini_gpt_pl.geometry.directions.axes import Axes, Axis, RandomDirections
from mini_gpt_pl.geometry.vectors.alignment import with_total
from mini_gpt_pl.geometry.vectors.products import inner_products, squared_norms
from mini_gpt_pl.geometry.vectors.selection import ParameterSelection, Vector


class Estimated(NamedTuple):
    """A mean over M gradients and its standard error, per group and, last, for the whole selection."""

    value: Float[Tensor, " G1"]
    error: Float[Tensor, " G1"]


# ---------------------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True)
class Survey:
    """What M gradients leave behind, in float64; column g is group g, the last one the whole selection.

    ||g_i||^2, <g_i, v> of each named unit direction, and on request <g_i, w_k> of random directions and <g_i, g_j> per
    group, which add up to the whole's.
    """

    squares: Float[Tensor, "M G1"]
    projections: Mapping[str, Float[Tensor, "M G1"]]
    random: Float[Tensor, "M K G1"] | None = None
    grams: Float[Tensor, "G M M"] | None = None

    def cpu(self) -> Survey:
        """Move everything to the host, in one transfer."""
        tensors = [self.squares, *self.projections.values()]
        tensors += [t for t in (self.random, self.grams) if t is not None]
        flat = torch.cat([t.reshape(-1) for t in tensors]).cpu().split([t.numel() for t in tensors])
        parts = iter([part.view(t.shape) for part, t in zip(flat, tensors, strict=True)])
        return Survey(
            next(parts),
            {name: next(parts) for name in self.projections},
            None if self.random is None else next(parts),
            None if self.grams is None else next(parts),
        )


def survey(
    gradient: Callable[[int], Vector],
    count: int,
    axes: Mapping[str, Axis],
    *,
    block: int = 8,
    gram: bool = False,
    random: RandomDirections | None = None,
) -> Survey:
    """Stream M gradients through a few rows of memory and keep scalars of them.

    A block of gradients meets all directions at once, so that each direction is read M / block times; block + 1
    gradients of D values are held. Without a Gram each gradient is computed once. The Gram needs every pair: while a
    block is held, the gradients after it are computed again, which takes M (M/block + 1) / 2 of them in all. block = M
    computes each once; for M = 32, block = 8 takes 80. `gradient` gives g_i for i in 0 .. M-1, the same whenever it is
    asked.

    Raises:
        ValueError: There are fewer than two gradients.
        FingerprintError: A gradient and a direction order their coordinates differently.
    """
    if count < 2:
        raise ValueError(f"a standard error takes at least two gradients, got {count}")
    table = Axes.of(axes) if axes else None
    squares, along, drawn, bands = [], [], [], []
    for begin, held, selection in _blocks(gradient, count, block):
        squares.append(with_total(squared_norms(held, selection).T))
        if table is not None:
            table.selection.accept(selection)
            along.append(table.project(held))
        if random is not None:
            random.axis.own.selection.accept(selection)
            drawn.append(random.project(held))
        if gram:  # of the held gradients with one another, then with each that comes after them
            band = [inner_products(held, held, selection)]
            for i in range(begin + len(held), count):
                later = gradient(i)
                selection.accept(later.selection)
                band.append(inner_products(held, later.values[None], selection))
            bands.append(pad(torch.cat(band, -1), (begin, 0)))
    projected = torch.cat(along).unbind(1) if along else ()
    upper = torch.cat(bands, 1) if gram else None
    return Survey(
        torch.cat(squares),
        dict(zip(axes, projected, strict=True)),
        torch.cat(drawn) if drawn else None,
        None if upper is None else upper.triu() + upper.triu(1).mT,
    )


def _blocks(
    gradient: Callable[[int], Vector], count: int, block: int
) -> Iterator[tuple[int, Float[Tensor, "B D"], ParameterSelection]]:
    """Yield gradients as rows of one matrix, which the next block overwrites, with the number of the first."""
    room: Float[Tensor, "B D"] | None = None
    for begin in range(0, count, block):
        first = gradient(begin)
        if room is None:
            room = first.values.new_empty(min(block, count), len(first.values))
        held = room[: count - begin]
        held[0] = first.values
        for i in range(1, len(held)):
            later = gradient(begin + i)
            first.selection.accept(later.selection)
            held[i] = later.values
        yield begin, held, first.selection


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


def trace(scalars: Survey) -> Estimated:
    """Trace of F, the mean of ||g_i||^2."""
    return mean_of(scalars.squares)


def anisotropy(quotients: Float[Tensor, "M G1"], squares: Float[Tensor, "M G1"], dims: Sequence[int]) -> Estimated:
    """q(v) over the mean Rayleigh quotient of all directions across v: 1 where F is isotropic.

    For w uniform on the unit sphere orthogonal to v, E[w'Fw] = (tr F - q(v)) / (D - 1) exactly, so no random direction
    has to be drawn. The error is the jackknife's over gradients. NaN where D is 1 or no gradient is left across v.
    `quotients` are <g_i, v>^2, `squares` ||g_i||^2, and `dims` D of each group, then of the whole.
    """
    others = torch.tensor(dims, dtype=squares.dtype, device=squares.device) - 1

    def ratio(along: Float[Tensor, "*batch G1"], total: Float[Tensor, "*batch G1"]) -> Float[Tensor, "*batch G1"]:
        across = total - along
        # Below the rounding of float32 products there is nothing across v that could be told from zero.
        visible = (others > 0) & (across > 1e-6 * total.abs())
        return torch.where(visible, along * others / across, float("nan"))

    without = [(values.sum(0) - values) / (len(values) - 1) for values in (quotients, squares)]  # each in turn
    return Estimated(ratio(quotients.mean(0), squares.mean(0)), _jackknife(ratio(*without)))


def sampled_anisotropy(projections: Float[Tensor, "M G1"], random: Float[Tensor, "M K G1"]) -> Float[Tensor, " G1"]:
    """q(v) over the mean Rayleigh quotient of K random directions across v: an estimate of `anisotropy`."""
    return projections.square().mean(0) / random.square().mean((0, 1))


@dataclass(frozen=True)
class Spectrum:
    """The M largest eigenvalues of F, descending; the other D - M are zero. Eigenvectors are combinations of gradients.

    u_k = sum_i w_ki g_i / sqrt(M lambda_k), where row k of `modes` is w_k, a unit eigenvector of the Gram matrix.
    """

    eigenvalues: Float[Tensor, " M"]
    modes: Float[Tensor, "M M"]

    def overlaps(self, projections: Float[Tensor, " M"]) -> Float[Tensor, " M"]:
        """|<u_k, v>| from <g_i, v> alone: no vector of D values is formed. Zero where lambda_k vanishes."""
        lengths = (len(self.eigenvalues) * self.eigenvalues).sqrt()
        seen = self.eigenvalues > len(self.eigenvalues) * torch.finfo(torch.float64).eps * self.eigenvalues[0]
        return torch.where(seen, (self.modes @ projections).abs() / lengths, 0.0)


def spectrum(gram: Float[Tensor, "M M"]) -> Spectrum:
    """Eigenvalues of F through the Gram <g_i, g_j> of one group, or summed over groups: G'G/M and GG'/M share them."""
    energy, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return Spectrum(energy.flip(0).clamp_min(0.0) / len(gram), vectors.flip(1).T)


class Leading(NamedTuple):
    """The first mode of F: lambda_1 and |<u_1, v>|, each with its jackknife standard error over gradients."""

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

    `mean` is the square of the mean, ||mu||^2 or <mu, v>^2, `noise` the variance of a single sample, tr Sigma or
    v' Sigma v.
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

    `small` and `large` are second moments of gradients of batches of these sizes. Both parts are unbiased, so either
    can come out negative where it is small.

    Raises:
        ValueError: The sizes are equal, or not in this order.
    """
    if not 0 < small_size < large_size:
        raise ValueError(f"two batch sizes, the smaller one first, are needed, got {small_size} and {large_size}")
    noise = (small - large) / (1.0 / small_size - 1.0 / large_size)
    return Moments(large - noise / large_size, noise)


def _jackknife(replicates: Float[Tensor, "M k"]) -> Float[Tensor, " k"]:
    """Standard error from the values without each gradient in turn."""
    count = len(replicates)
    return ((count - 1) / count * (replicates - replicates.mean(0)).square().sum(0)).sqrt()
