r"""Centred PCA of the weights themselves, and how much of it is theta_0.

The studies of grokking (arXiv 2602.16746) subtract the mean over snapshots, which `pca` does not. Rows are theta_t for
t = 0 .. T, first snapshot included, minus their mean; subtracting theta_0 before changes nothing. In coefficients that
is the matrix of drifts minus its mean row, so it is algebra on the same Gram matrix H, and explained shares have the
full trace in their denominator. A free walk of equal steps has a share of 6/pi^2 = 60.8 % on its first centred
component (Antognini and Sohl-Dickstein, arXiv 1806.08805), pure decay 100 %, and noise around a fixed point about 1/T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import innovations, nulls, pca
from mini_gpt_pl.geometry.path.pca import Rows


def centred(rows: Rows) -> Rows:
    """Subtract the mean row: coefficients of `pca.drifts` or `pca.weights` become those of centred PCA.

    Example:
        >>> import math
        >>> walk = torch.eye(1001, dtype=torch.float64)
        >>> round(pca.pca(walk, centred(pca.drifts(1001))).pc1 * math.pi**2, 2)
        6.0
    """
    return rows - rows.mean(0)


def off_theta0(grams: Float[Tensor, "B n n"], rows: Rows) -> Float[Tensor, "B R n"]:
    """Project theta_0 out of rows, path by path: x - <x, theta_0> theta_0 / ||theta_0||^2; x itself without theta_0."""
    square = grams[:, :1, 0]
    along = torch.where(square > 0, (rows @ grams)[..., 0] / square.clamp_min(1e-300), 0.0)
    return rows - along[..., None] * pca.theta0(rows.shape[-1])


def effective_ranks(energy: Float[Tensor, "*batch R"]) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Effective number of components, exp of the entropy of the shares, in two kinds, from squared singular values.

    Of variances, p_k = s_k^2 / sum s^2, and of singular values, p_k = s_k / sum s (Roy and Vetterli 2007), which is
    what arXiv 2602.10496 prints and the larger of the two.
    """
    both = torch.stack([energy, energy.clamp_min(0.0).sqrt()])
    variances, singular_values = torch.special.entr(both / both.sum(-1, keepdim=True)).sum(-1).exp()
    return variances, singular_values


def growing_pc1(gram: Float[Tensor, "*batch n n"], ends: Sequence[int]) -> Float[Tensor, "*batch W"]:
    """Centred PC1 of the first t snapshots for each t of `windows.growing_ends`, of one path or of several.

    A share that rises and falls says where the path bends as much as where it was cut: put the curve of a null, the
    same function of its Gram matrix, beside it. NaN where nothing has moved.
    """
    n = gram.shape[-1]
    rows = torch.zeros(len(ends), n, n, dtype=torch.float64)  # rows that are zero add nothing to a spectrum
    for k, end in enumerate(ends):
        rows[k, :end] = centred(pca.drifts(n)[:end])
    grams = gram.reshape(-1, 1, n, n).expand(-1, len(ends), -1, -1).reshape(-1, n, n)
    energy = pca.energies(grams, rows.repeat(len(grams) // len(ends), 1, 1))
    return nulls.first_share(energy).reshape(*gram.shape[:-2], len(ends))


def turnover(curve: Float[Tensor, " W"]) -> int | None:
    """Index at which a growing-window curve turns: from there it falls twice in a row, after its late maximum.

    The late maximum is the largest value behind the curve's minimum; the turn is the first index from it on whose two
    successors each lie lower than their predecessor. None if there is none (the PC1 turnover of arXiv 2602.16746).
    """
    low = int(curve.argmin())
    peak = low + int(curve[low:].argmax())
    falls = curve.diff() < 0
    return next((k for k in range(peak, len(falls) - 1) if falls[k] and falls[k + 1]), None)


def centred_statistics(grams: Float[Tensor, "B n n"], survival: Sequence[float]) -> dict[str, Float[Tensor, " B"]]:
    """Single numbers of paths that have moved, with the same decay, as `nulls.statistics_of` for uncentred PCA.

    Of centred PCA: `pc1_centred`, `pc2_centred`, `k90_centred`, `k95_centred`, `k99_centred`, `rank_variances`,
    `rank_singular_values`, and `pc1_centred_off`, PC1 with the axis theta_0 taken out (NaN where nothing is left). Of
    uncentred PCA: `pc1`. How much is theta_0: `cos_theta0_centred`, `cos_theta0` (raw v_b), `cos_theta0_unit` (v_b of
    unit rows), their signs as in `pca`, and `energy_theta0`, the share of sum ||x_t||^2 along theta_0. Correlations at
    lag 1: `autocorrelation` of increments, `autocorrelation_innovations`, `autocorrelation_tangential` (see
    `innovations.correlation`).
    """
    drifts = pca.drifts(grams.shape[-1])
    rows = centred(drifts)
    main, raw = pca.spectra(grams, rows), pca.spectra(grams, drifts[1:])
    numbers = nulls.spectral(main.energy, "_centred", (90, 95, 99))
    numbers["rank_variances"], numbers["rank_singular_values"] = effective_ranks(main.energy)
    numbers["pc1_centred_off"] = nulls.first_share(pca.energies(grams, off_theta0(grams, rows)))
    numbers["pc1"] = nulls.first_share(raw.energy)
    unit = pca.spectra(grams, drifts[1:], normalise=True)
    length = grams[:, 0, 0].sqrt().clamp_min(1e-300)
    for suffix, part in (("_centred", main), ("", raw), ("_unit", unit)):
        numbers[f"cos_theta0{suffix}"] = (part.directions[:, 0] * grams[:, 0]).sum(-1) / length
    along = (drifts @ grams)[..., 0].square().sum(-1) / grams[:, 0, 0].clamp_min(1e-300)
    numbers["energy_theta0"] = along / pca.norms(grams, drifts).square().sum(-1)
    steps = innovations.innovations(grams, survival), innovations.innovations(grams, survival, tangential=True)
    for suffix, products in zip(("", "_innovations", "_tangential"), (grams, *steps), strict=True):
        numbers[f"autocorrelation{suffix}"] = nulls.autocorrelation(products, 1)[:, 0]
    return numbers
