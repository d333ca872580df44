r"""What a path does beyond weight decay: innovations, their persistence, and the nulls that are made of them.

With rho_k = S_k / S_{k-1} the share of the weights that decay leaves over interval k,

    theta_k = rho_k theta_{k-1} + e_k,    d_k = e_k - (1 - rho_k) theta_{k-1}.

Both ways are linear, so the Gram matrix of (theta_0, e_1, ..., e_T) and that of (theta_0, d_1, ..., d_T) are two
views of one path (`innovations`, `path_of`), and a null is a Gram matrix of innovations brought back to a path. Without
decay, innovations are increments. `gram` is H of one path or of several, and `survival` S, as in `nulls`, whose
ValueError is raised where there is not one share per snapshot.

PC1 cannot tell a drift from a walk; the correlation of successive innovations can: it is zero for every walk, decaying
or not, whatever its step lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import nulls, pca
from mini_gpt_pl.geometry.path.pca import Gram, Rows


def innovation_rows(survival: Sequence[float]) -> Rows:
    """Coefficients of theta_0 and of e_k = theta_k - rho_k theta_{k-1}, k = 1 .. T, over (theta_0, d_1, ..., d_T)."""
    n = len(survival)
    rows = torch.eye(n, dtype=torch.float64)
    rows[1:] += (1.0 - nulls.kept(survival))[:, None] * pca.weights(n)[:-1]
    return rows


def innovations(
    gram: Float[Tensor, "*batch n n"], survival: Sequence[float], *, tangential: bool = False
) -> Float[Tensor, "*batch n n"]:
    """Gram matrix of (theta_0, e_1, ..., e_T); those that are rounding are zero: pure decay has no innovations.

    With `tangential`, e_k are without their part along the weights that they start from, theta_{k-1}.
    """
    nulls.check_survival(gram, survival)
    rows = innovation_rows(survival)
    if tangential:
        start = pca.weights(len(survival))[:-1]
        along = (rows[1:] @ gram).mul(start).sum(-1) / (start @ gram).mul(start).sum(-1).clamp_min(1e-300)
        rows = rows.expand(*gram.shape[:-2], -1, -1).clone()
        rows[..., 1:, :] -= along[..., None] * start
    products = pca.inner_products(gram, rows)
    real = products.diagonal(dim1=-2, dim2=-1) > pca.rounding(gram, rows)
    return torch.where(real[..., :, None] & real[..., None, :], products, 0.0)


def path_of(innovation_gram: Float[Tensor, "*batch n n"], survival: Sequence[float]) -> Float[Tensor, "*batch n n"]:
    """Gram matrix H of the path that decays and takes these innovations: the inverse of `innovations`."""
    nulls.check_survival(innovation_gram, survival)
    rows = innovation_rows(survival)
    back = torch.linalg.solve_triangular(rows, torch.eye(len(rows), dtype=torch.float64), upper=False)
    return pca.inner_products(innovation_gram, back)


# ------------------------------------------------------------------------------------------------------- nulls


def innovation_walk(gram: Float[Tensor, "*batch n n"], survival: Sequence[float]) -> Float[Tensor, "*batch n n"]:
    """Gram of a decaying walk with the measured innovation lengths ||theta_k - rho_k theta_{k-1}||.

    `nulls.decaying_walk` keeps ||d_k|| instead. The two agree where the measured innovations are orthogonal to the
    weights. Where training pushes back against decay, <e_k, theta_{k-1}> > 0, part of an innovation only holds the
    weights up; here it is kept as length in a new direction, so this null takes longer steps than the run did.
    """
    return path_of(nulls.walk(innovations(gram, survival)), survival)


def autoregressive_walk(
    gram: Float[Tensor, "*batch n n"], survival: Sequence[float] | None = None
) -> Float[Tensor, "*batch n n"]:
    """Gram of a walk whose steps are a first-order autoregression, with the measured lengths and lag-1 correlation.

    The directions u_k = e_k / ||e_k|| follow u_k = phi u_{k-1} + sqrt(1 - phi^2) z_k with z_k orthogonal to all that
    was before, so <u_j, u_k> = phi^|j-k|: a persistence that is forgotten after about 1 / (1 - phi) snapshots. The
    autoregression is one of the innovations under decay; of the increments for None.
    """
    shares = [1.0] * gram.shape[-1] if survival is None else survival
    own = innovations(gram, shares)
    lengths = own.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    shape = autoregressive_cosines(lag1(own), gram.shape[-1])
    return path_of(shape * lengths[..., :, None] * lengths[..., None, :], shares)


def lag1(steps: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch"]:
    """Correlation phi of successive steps, from the Gram matrix of theta_0 and the steps.

    0 where it is not known (fewer than two steps, or none that has a length), and short of 1 on a straight line.
    """
    return nulls.autocorrelation(steps, 1)[..., 0].nan_to_num(0.0).clamp(-1 + 1e-9, 1 - 1e-9)


def autoregressive_cosines(phi: Float[Tensor, "*batch"], n: int) -> Float[Tensor, "*batch n n"]:
    """Cosines phi^|j-k| of steps 1 .. n-1 of a first-order autoregression, with theta_0, orthogonal to all, first."""
    lags = torch.arange(n - 1, dtype=torch.float64)
    shape = torch.zeros(*phi.shape, n, n, dtype=torch.float64)
    shape[..., 0, 0] = 1.0
    shape[..., 1:, 1:] = phi[..., None, None] ** (lags[:, None] - lags).abs()
    return shape


# ------------------------------------------------------------------------------------------------- persistence


@dataclass(frozen=True)
class Correlation:
    """Correlation of successive innovations beside what none would give.

    Args:
        value: sum <e_k, e_{k+1}> / sum ||e_k|| ||e_{k+1}||.
        error: Standard error of it over the T - 1 pairs taken as independent; NaN with fewer than three pairs.
        chance: Standard deviation that isotropic innovations of these lengths have around the null, 0.
    """

    value: float
    error: float
    chance: float


def correlation(gram: Gram, survival: Sequence[float], dim: int, *, tangential: bool = False) -> Correlation:
    r"""Correlation of innovations of `dim` weights at lag 1: is there a drift that decay does not explain?

    `error` says how far another stretch of such a path would lie off, `chance` how far a walk lies from 0: the pairs of
    a walk are uncorrelated with variance ||e_k||^2 ||e_{k+1}||^2 / D. Real innovations spread over fewer directions
    than D, so `chance` is a lower bound.

    A positive value is a push that lasts, not yet a motion: weights that rest where the loss's pull balances decay
    have e_k = (1 - rho_k) theta_{k-1}, correlation 1. `tangential` looks past that.
    """
    products = innovations(gram, survival, tangential=tangential)[1:, 1:]
    lengths = products.diagonal().clamp_min(0.0).sqrt()
    pairs, scale = products.diagonal(1), lengths[:-1] * lengths[1:]
    total = float(scale.sum())
    if total == 0:
        return Correlation(math.nan, math.nan, math.nan)
    value = float(pairs.sum()) / total
    scatter = float((pairs - value * scale).square().sum())  # of a ratio of sums, to first order
    count = len(pairs)
    error = math.sqrt(scatter * count / (count - 1)) / total if count > 2 else math.nan
    return Correlation(value, error, float(scale.square().sum().sqrt()) / total / math.sqrt(dim))
