r"""What chance and weight decay alone would have given, in closed form from what the run itself recorded.

Two nulls, each a Gram matrix over the same basis (theta_0, d_1, ..., d_T) as the measured one, so that every function
of `pca` applies to it unchanged and nothing has to be sampled:

* `walk`: increments of the measured lengths in mutually orthogonal directions, orthogonal to theta_0 too. In millions
  of dimensions that is what independent directions do.
* `decaying_walk`: theta_k = rho_k theta_{k-1} + e_k, where rho_k is the share that the run's own lr x weight decay
  leaves over interval k, and the innovations e_k are mutually orthogonal, as long as they must be for ||d_k|| to be the
  measured length. Decay pulls on theta_0 and on the accumulated noise alike, so d_k = (rho_k - 1) theta_{k-1} + e_k.

Without weight decay the second is the first. Throughout, `gram` is H of a run, and `survival` the share of theta_0 that
decay alone leaves at each snapshot: 1 at the first, NaN where it is not known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.pca import Gram, Rows


def walk(gram: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Gram of a walk with the measured increment lengths and no preferred direction; of one path or of several."""
    return gram.diagonal(dim1=-2, dim2=-1).diag_embed()


def decaying_walk(gram: Float[Tensor, "*batch n n"], survival: Sequence[float]) -> Float[Tensor, "*batch n n"]:
    """Gram of a decaying walk with the measured increment lengths; of one path or of several.

    NaN where the decay is not known. An interval in which decay alone moves further than was measured gets no
    innovation, so its increment is the decay's (longer than the measured one).

    Raises:
        ValueError: There is not one share per snapshot.
    """
    check_survival(gram, survival)
    n, shares = gram.shape[-1], kept(survival)
    square = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    # Coordinates over the orthonormal basis (theta_0 / ||theta_0||, e_1 / ||e_1||, ...): one row per vector.
    position = torch.zeros(*gram.shape[:-2], n, dtype=torch.float64)
    position[..., 0] = square[..., 0].sqrt()
    basis = [position]
    for k in range(1, n):
        increment = (shares[k - 1] - 1.0) * position
        left = square[..., k] - increment.square().sum(-1)
        increment[..., k] = left.clamp_min(0.0).sqrt()
        position = position + increment
        basis.append(increment)
    coordinates = torch.stack(basis, -2)
    return coordinates @ coordinates.mT


def decaying_walk_of_parts(
    squares: Float[Tensor, "*batch R n"], curves: Float[Tensor, "R n"]
) -> Float[Tensor, "*batch n n"]:
    """Gram of a decaying walk whose weights decay at several rates.

    The weights of each rate walk by themselves, theta_k^r = rho_k^r theta_{k-1}^r + e_k^r, and their inner products add
    up, as those of any disjoint weights do. A decaying walk asks for the squared lengths of theta_0 and of the
    increments only, so these and the survival curve are all that has to be known of each rate. An unknown curve makes
    the walk unknown where the rate has any weights.
    """
    present = (squares > 0).any(-1)[..., None, None]
    parts = zip(squares.unbind(-2), curves, strict=True)
    walks = torch.stack([decaying_walk(part.diag_embed(), curve.tolist()) for part, curve in parts], -3)
    return torch.where(present, walks, 0.0).sum(-3)


def check_survival(gram: Float[Tensor, "*batch n n"], survival: Sequence[float]) -> None:
    """Raise ValueError where there is not one surviving share per snapshot of a path."""
    if len(survival) != gram.shape[-1]:
        raise ValueError(f"expected one surviving share per snapshot, {gram.shape[-1]}, got {len(survival)}")


def kept(survival: Sequence[float]) -> Float[Tensor, " T"]:
    """Shares rho_k = S_k / S_{k-1} of the weights that decay leaves over each interval; 1 once nothing was left."""
    shares = [1.0 if earlier <= 0 else later / earlier for earlier, later in itertools.pairwise(survival)]
    return torch.tensor(shares, dtype=torch.float64)


def decay_corrected(survival: Sequence[float]) -> Rows:
    """Coefficients of the drifts with the decay of theta_0 taken out, x(t) + (1 - S_t) theta_0, t = 1 .. T."""
    rows = pca.drifts(len(survival))[1:].clone()
    rows[:, 0] = 1.0 - torch.tensor(survival[1:], dtype=torch.float64)
    return rows


# ------------------------------------------------------------------------------------- statistics of the updates


def autocorrelation(
    gram: Float[Tensor, "*batch n n"], lags: int, *, off_theta0: bool = False
) -> Float[Tensor, "*batch L"]:
    """Correlation of increments by lag, sum <d_k, d_{k+L}> / sum ||d_k|| ||d_{k+L}||, for L = 1 .. lags.

    Zero for a free walk, whatever its PC1. Decay alone makes it differ from zero: positive where it pulls theta_0 in,
    negative where it pulls back what has just been walked, so compare with the decaying walk. Lags beyond T - 1 are
    NaN. `off_theta0` projects theta_0 out of every increment first.
    """
    n = gram.shape[-1]
    products = gram[..., 1:, 1:]
    if off_theta0:
        along, square = gram[..., 1:, :1], gram[..., :1, :1]
        products = products - torch.where(square > 0, along * along.mT / square.clamp_min(1e-300), 0.0)
    lengths = products.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    out = torch.full((*gram.shape[:-2], lags), torch.nan, dtype=torch.float64)
    for lag in range(1, min(lags, n - 2) + 1):
        scale = (lengths[..., :-lag] * lengths[..., lag:]).sum(-1)
        total = products.diagonal(lag, dim1=-2, dim2=-1).sum(-1)
        out[..., lag - 1] = torch.where(scale > 0, total / scale, torch.nan)
    return out


def persistence(gram: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch T"]:
    """||x(t)|| over the length of a free walk with the same increments, sqrt(sum ||d_k||^2): 1 for a free walk."""
    drift = pca.norms(gram, pca.drifts(gram.shape[-1])[1:])
    free = gram.diagonal(dim1=-2, dim2=-1)[..., 1:].cumsum(-1).clamp_min(0.0).sqrt()
    return torch.where(free > 0, drift / free.clamp_min(1e-300), 0.0)


def participation(gram: Float[Tensor, "*batch n n"], rows: Rows) -> Float[Tensor, "*batch"]:
    """Participation ratio (sum s^2)^2 / sum s^4 of rows: the number of directions that share their energy."""
    products = rows @ gram @ rows.T  # sum s^2 is its trace, sum s^4 the square of its Frobenius norm
    trace = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = products.square().sum((-2, -1))
    return torch.where(scale > 0, trace.square() / scale.clamp_min(1e-300), 0.0)


# ------------------------------------------------------------------------------------------ numbers beside nulls


def statistics(gram: Gram, survival: Sequence[float]) -> dict[str, float]:
    """The single numbers that describe a trajectory: what is compared with the nulls.

    PC1 and PC2, k95 and k99 with raw and with unit rows; the first component of the decay-corrected drift; persistence
    at the end; participation of drifts and of updates; autocorrelation at lag 1, raw and off theta_0;
    cos(v_b, theta_0); and the last drift's coordinate along v_b, what is left across it, and the fraction of its
    squared length along it.

    Raises:
        ValueError: Nothing has moved.
    """
    if float(pca.norms(gram, pca.drifts(len(gram))).max()) == 0:
        raise ValueError("every row is zero: a trajectory without movement has no principal direction")
    return {name: float(values[0]) for name, values in statistics_of(gram[None], survival).items()}


def statistics_of(grams: Float[Tensor, "B n n"], survival: Sequence[float]) -> dict[str, Float[Tensor, " B"]]:
    """`statistics` of several paths that have moved, with the same decay."""
    n = grams.shape[-1]
    rows = pca.drifts(n)[1:]
    raw = pca.spectra(grams, rows)
    numbers = spectral(raw.energy, "") | spectral(pca.energies(grams, rows, normalise=True), "_unit")
    backbone = raw.directions[:, 0]
    along = torch.einsum("bn,bn->b", backbone, grams[:, 0])
    numbers["cos_theta0"] = along / grams[:, 0, 0].sqrt().clamp_min(1e-300)  # v_b has unit length
    without = corrected(grams, survival)
    numbers["pc1_corrected"] = without["pc1_corrected"]
    drift = numbers["drift"] = pca.norms(grams, rows[-1:])[:, 0]
    coordinate = numbers["coordinate"] = torch.einsum("bn,bnm,m->b", backbone, grams, rows[-1])
    numbers["residual"] = pca.norms(grams, rows[-1] - coordinate[:, None, None] * backbone[:, None])[:, 0]
    numbers["fraction"] = coordinate.square() / drift.square().clamp_min(1e-300)
    numbers["drift_corrected"] = without["drift_corrected"]
    numbers["persistence"] = persistence(grams)[:, -1]
    numbers["participation"] = participation(grams, rows)
    numbers["participation_updates"] = participation(grams, torch.eye(n, dtype=torch.float64)[1:])
    numbers["autocorrelation"] = autocorrelation(grams, 1)[:, 0]
    numbers["autocorrelation_off"] = autocorrelation(grams, 1, off_theta0=True)[:, 0]
    unknown = grams.isnan().any(-1).any(-1)
    return {name: torch.where(unknown, torch.nan, values) for name, values in numbers.items()}


def corrected(grams: Float[Tensor, "B n n"], survival: Sequence[float]) -> dict[str, Float[Tensor, " B"]]:
    """The numbers of `statistics_of` for which the decay of theta_0 is taken out; NaN where it is not known."""
    rows = decay_corrected(survival)
    if bool(rows.isnan().any()):
        return dict.fromkeys(("pc1_corrected", "drift_corrected"), torch.full((len(grams),), torch.nan).double())
    share = first_share(pca.energies(grams, rows))
    return {"pc1_corrected": share, "drift_corrected": pca.norms(grams, rows[-1:])[:, 0]}


def spectral(
    energy: Float[Tensor, "*batch R"], suffix: str, percents: Sequence[int] = (95, 99)
) -> dict[str, Float[Tensor, "*batch"]]:
    """PC1, PC2 and the fewest components for each share (k95 for 95) of spectra of squared singular values."""
    ratios = energy / energy.sum(-1, keepdim=True)
    reached = torch.cumsum(ratios, -1)
    second = ratios[..., 1] if ratios.shape[-1] > 1 else torch.zeros_like(ratios[..., 0])
    numbers = {f"pc1{suffix}": ratios[..., 0], f"pc2{suffix}": second}
    for percent in percents:
        numbers[f"k{percent}{suffix}"] = (reached < percent / 100 - 1e-12).sum(-1).double() + 1.0
    return numbers


def first_share(energy: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Share of the first component, NaN where nothing is left (pure decay, corrected)."""
    total = energy.sum(-1)
    return torch.where(total > 0, energy[:, 0] / total.clamp_min(1e-300), torch.nan)


def profile_statistics(gram: Gram, width: int = 10) -> dict[str, float]:
    """Numbers that summarise a curve along the run: the three window variants and the update alignment.

    Means of |cos| between windows (left out where the run has fewer than `width` + 1 snapshots) and of the cosine of
    increments with the whole-run and with the past-only backbone.
    """
    rolling = _ROLLING.items() if len(gram) > width + 1 else ()
    means = {name: float(curve(gram, width).cosines.mean()) for name, curve in rolling}
    direction = pca.pca(gram, pca.drifts(len(gram))[1:]).backbone
    means["update_alignment"] = float(pca.update_alignment(gram, direction).abs().mean())
    past = pca.past_update_alignment(gram)
    past = past[~past.isnan()]
    return means | {"update_alignment_past": float(past.mean()) if len(past) else math.nan}


_ROLLING: Mapping[str, Callable[[Gram, int], pca.RollingBackbone]] = {
    "windows_origin_anchored": pca.rolling_origin_anchored,
    "windows_self_anchored": pca.rolling_self_anchored,
    "windows_against_global": pca.rolling_against_global,
}


@dataclass(frozen=True)
class Calibrated:
    """A measured value beside those of the walk and of the decaying walk with the same step lengths.

    `low` and `high` are the ends of the 95 % interval of the excess, NaN if none was asked for.
    """

    value: float
    walk: float
    decay: float
    low: float = math.nan
    high: float = math.nan

    @property
    def excess(self) -> float:
        """Measured minus decaying walk: what neither chance nor decay explains."""
        return self.value - self.decay


def calibrate(
    gram: Gram,
    survival: Sequence[float],
    *,
    null: Gram | None = None,
    curves: bool = False,
    bootstrap: int = 0,
    seed: int = 0,
) -> dict[str, Calibrated]:
    """Put every statistic beside its two nulls, with `curves` those of `profile_statistics` too.

    With `bootstrap`, the number of resamples, the spectral numbers have 95 % intervals of their excess. Weights that
    decay at several rates have a decaying walk of their own, `null`.
    """

    def describe(h: Gram) -> dict[str, float]:
        return statistics(h, survival) | (profile_statistics(h) if curves else {})

    null = decaying_walk(gram, survival) if null is None else null
    finite = bool(torch.isfinite(null).all())
    measured, free, decaying = describe(gram), describe(walk(gram)), describe(null) if finite else {}
    intervals = block_bootstrap(gram, null, draws=bootstrap, seed=seed) if bootstrap and finite else {}
    return {
        name: Calibrated(value, free[name], decaying.get(name, math.nan), *intervals.get(name, (math.nan, math.nan)))
        for name, value in measured.items()
    }


def block_bootstrap(gram: Gram, null: Gram, draws: int = 200, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of the excess of PC1 and k95 over a null, by a moving-block bootstrap over snapshots.

    Rows are resampled in blocks of about T^(1/3) consecutive snapshots (Kuensch 1989), because neighbours on a path are
    anything but independent, and the same rows are taken of the measured and of the null path, because fewer distinct
    rows raise the PC1 of both. The intervals say how much an excess depends on which snapshots were taken; they say
    nothing about another seed of the run.
    """
    rows = pca.drifts(len(gram))[1:]
    total = len(rows)
    length = max(1, round(total ** (1 / 3)))
    rng = np.random.Generator(np.random.Philox(key=seed))
    starts = rng.integers(0, total - length + 1, size=(draws, math.ceil(total / length)))
    chosen = torch.from_numpy((starts[:, :, None] + np.arange(length)).reshape(draws, -1)[:, :total])
    measured, expected = (_resampled_spectra(path, rows, chosen) for path in (gram, null))
    quantiles = {name: np.quantile(measured[name] - expected[name], (0.025, 0.975)) for name in measured}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def _resampled_spectra(
    gram: Gram, rows: Rows, chosen: Int[Tensor, "draws R"]
) -> dict[str, Float[np.ndarray, " draws"]]:
    """PC1 and k95 of resampled rows, raw and of unit length, a value a draw, from the Gram matrices of the rows."""
    products = rows @ gram @ rows.T
    lengths = products.diagonal().clamp_min(0.0).sqrt()
    unit = products / (lengths[:, None] * lengths).clamp_min(1e-300)
    numbers: dict[str, Tensor] = {}
    for suffix, table in (("", products), ("_unit", unit)):
        # One batch of eigenvalue problems: single ones of this size are all overhead.
        energy = torch.linalg.eigvalsh(table[chosen[:, :, None], chosen[:, None, :]]).flip(-1).clamp_min(0.0)
        numbers |= spectral(energy, suffix, (95,))
    return {name: values.numpy() for name, values in numbers.items() if not name.startswith("pc2")}
