r"""Nulls with a spread: ensembles of Gram matrices, and where a measured number lies among theirs.

The closed forms of `nulls` and `innovations` hold in the limit of many weights. An ensemble says how far one path of D
weights strays from them, and reshuffles the measured steps themselves. Quantiles are given, never z-scores: a walk's
PC1 has a standard deviation of half a point in 16,384 weights and less in more, so any z can be had by taking more
weights, and says nothing of how unlike a walk the path is.

Gram matrices are drawn directly, not D-vectors: inner products of n independent Gaussian vectors in D dimensions are a
Wishart matrix, A A' with A lower triangular, chi-distributed on and normal below its diagonal (Bartlett 1933).

Throughout, `gram` is H of the run, `survival` its decay as in `nulls`, `dim` its number of weights D, and `seed` that
of `draws` paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import innovations, nulls
from mini_gpt_pl.geometry.path.centred import centred_statistics
from mini_gpt_pl.geometry.path.pca import Gram

_LEVELS = (0.025, 0.5, 0.975)


def permuted(
    gram: Gram, draws: int, seed: int = 0, survival: Sequence[float] | None = None
) -> Float[Tensor, "draws n n"]:
    """Grams of the measured steps in random orders: exact, their lengths and all their inner products are kept.

    The steps are the innovations under a decay; the increments for None. The end point stays where it was, so a path
    that goes somewhere does so in any order. (Permuting the *rows* of a drift matrix changes no singular value and is
    no null.)
    """
    shares = [1.0] * len(gram) if survival is None else survival
    own = innovations.innovations(gram, shares)
    orders = np.tile(np.arange(len(gram)), (draws, 1))
    orders[:, 1:] = _rng(seed, 0).permuted(orders[:, 1:], axis=1)
    order = torch.from_numpy(orders)
    return innovations.path_of(own[order[:, :, None], order[:, None, :]], shares)


def sampled_walk(
    gram: Gram, dim: int, draws: int, seed: int = 0, *, survival: Sequence[float] | None = None, phi: float = 0.0
) -> Float[Tensor, "draws n n"]:
    """Grams of walks in `dim` dimensions with the measured step lengths, in independent isotropic directions.

    Under a decay the steps have the lengths of the innovations, as in `innovations.innovation_walk`; for None a free
    walk with those of the increments. Successive directions correlate by `phi`, as in
    `innovations.autoregressive_walk`.
    """
    shares = [1.0] * len(gram) if survival is None else survival
    lengths = innovations.innovations(gram, shares).diagonal().clamp_min(0.0).sqrt()
    shape = innovations.autoregressive_cosines(torch.tensor(phi, dtype=torch.float64), len(gram))
    steps = _unit(torch.linalg.cholesky(shape) @ _factors(len(gram), dim, draws, seed)) * lengths[:, None]
    return innovations.path_of(steps @ steps.mT, shares)


def sampled_decaying_walk(
    gram: Gram, survival: Sequence[float], dim: int, draws: int, seed: int = 0
) -> Float[Tensor, "draws n n"]:
    """Grams of `nulls.decaying_walk` in `dim` dimensions: innovations as long as the increments' lengths ask for.

    The innovation's length is the positive root of ||(rho_k - 1) theta_{k-1} + a u_k|| = ||d_k||, u_k isotropic; zero
    where decay alone is longer.
    """
    nulls.check_survival(gram, survival)
    units = _unit(_factors(len(gram), dim, draws, seed))
    square = gram.diagonal().clamp_min(0.0)
    position = square[0].sqrt() * units[:, 0]
    basis = [position]
    for k, share in enumerate(nulls.kept(survival), start=1):
        pull = (share - 1.0) * position
        along = (pull * units[:, k]).sum(-1)
        left = square[k] - pull.square().sum(-1)
        length = torch.where(left > 0, (along.square() + left).clamp_min(0.0).sqrt() - along, 0.0)
        basis.append(pull + length[:, None] * units[:, k])
        position = position + basis[-1]
    vectors = torch.stack(basis, 1)
    return vectors @ vectors.mT


def _unit(rows: Float[Tensor, "draws n k"]) -> Float[Tensor, "draws n k"]:
    return rows / rows.norm(dim=-1, keepdim=True)


def _factors(n: int, dim: int, draws: int, seed: int) -> Float[Tensor, "draws n k"]:
    """Rows whose inner products are those of n independent standard normal vectors in `dim` dimensions."""
    rng = _rng(seed, 1)
    if dim < n:
        return torch.from_numpy(rng.standard_normal((draws, n, dim)))
    factors = np.tril(rng.standard_normal((draws, n, n)), -1)
    factors[:, range(n), range(n)] = np.sqrt(rng.chisquare(dim - np.arange(n), (draws, n)))
    return torch.from_numpy(factors)


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


# ------------------------------------------------------------------------------------------ numbers among nulls


@dataclass(frozen=True)
class Band:
    """The 2.5 %, 50 % and 97.5 % quantiles of a null's values, and the measured one among them.

    `below` is the share of the draws below the measured value, ties half: 0 under all of them, 1 above all.
    """

    low: float
    median: float
    high: float
    below: float


@dataclass(frozen=True)
class Placed:
    """A number as measured, and the bands of its nulls by their names."""

    value: float
    bands: dict[str, Band]

    def excess(self, null: str) -> float:
        """Measured minus the null's median."""
        return self.value - self.bands[null].median


def ensembles(
    gram: Gram, survival: Sequence[float], dim: int, draws: int = 100, seed: int = 0
) -> dict[str, Float[Tensor, "draws n n"]]:
    """Draw the nulls of a path.

    Returns:
        `walk`; `decaying_walk` (keeps the lengths of increments) and `innovation_walk` (those of innovations), which
        can be far apart; `autoregressive_walk` (of innovations, under decay); `permuted` (increments) and
        `permuted_innovations`.
    """
    phi = float(innovations.lag1(innovations.innovations(gram, survival)))
    return {
        "walk": sampled_walk(gram, dim, draws, seed),
        "decaying_walk": sampled_decaying_walk(gram, survival, dim, draws, seed),
        "innovation_walk": sampled_walk(gram, dim, draws, seed, survival=survival),
        "autoregressive_walk": sampled_walk(gram, dim, draws, seed, survival=survival, phi=phi),
        "permuted": permuted(gram, draws, seed),
        "permuted_innovations": permuted(gram, draws, seed, survival),
    }


def place(gram: Gram, survival: Sequence[float], dim: int, draws: int = 100, seed: int = 0) -> dict[str, Placed]:
    """Put every number of `centred.centred_statistics` among those of the nulls of `ensembles`.

    Example:
        trajectory = run.trajectory
        numbers = place(trajectory.gram(group), trajectory.survival, trajectory.dim_of(group))
        numbers["pc1_centred"].value, numbers["pc1_centred"].bands["innovation_walk"]
    """
    drawn = ensembles(gram, survival, dim, draws, seed)
    every = centred_statistics(torch.cat([gram[None], *drawn.values()]), survival)  # one batch of eigenvalue problems
    return {
        name: Placed(
            float(values[0]), dict(zip(drawn, [band(values[0], null) for null in values[1:].split(draws)], strict=True))
        )
        for name, values in every.items()
    }


def band(value: Float[Tensor, ""], draws: Float[Tensor, " draws"]) -> Band:
    """Quantiles of a null's draws, and the share of them below a value; draws that are NaN are left out."""
    numbers = draws[~draws.isnan()].numpy()
    if not len(numbers) or value.isnan():
        return Band(*[float("nan")] * 4)
    below = np.mean(numbers < float(value)) + np.mean(numbers == float(value)) / 2
    low, median, high = np.quantile(numbers, _LEVELS).tolist()
    return Band(low, median, high, float(below))
