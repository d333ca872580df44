r"""How the backbone coordinate and the residual grow, and how the direction of an early phase sits to a late one's.

Everything comes from the Gram matrix of `trajectory`, so the same functions give the null: hand them the Gram matrix of
a walk. That is not idle. Decoupled weight decay under a linear warm-up alone moves weights as t^2, and exponents fitted
to one run describe that run's schedule as much as its geometry.

Windows (lo, hi) are lo < t <= hi in optimizer steps; `steps` are those of all snapshots, theta_0's included, unless
another series is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca

Window = tuple[int, int]

# The windows of the 10,000-step runs of arXiv 2602.23696.
WINDOWS: tuple[Window, ...] = ((0, 2000), (2000, 4000), (0, 4000), (4000, 6000), (4000, 10000), (6000, 10000))
_FEWEST = 3


def scaled_windows(last: int) -> tuple[Window, ...]:
    """`WINDOWS` for a run of another length: the same shares of the run."""
    return tuple((round(lo * last / 10_000), round(hi * last / 10_000)) for lo, hi in WINDOWS)


# ------------------------------------------------------------------------------------------------ power laws


@dataclass(frozen=True)
class PowerLaw:
    """A fit |y| = prefactor * t^exponent to a number of points.

    `r2` is the share of the variance of ln |y| that the line explains; 1 where there is no variance.
    """

    exponent: float
    prefactor: float
    r2: float
    points: int


def power_law(steps: Sequence[int | float], values: Sequence[float], lo: int, hi: int | float) -> PowerLaw | None:
    """Fit a power law by least squares of ln |y| on ln t in a window; None with fewer than three points.

    `values` y at `steps` t that are zero or not finite are left out.
    """
    points = [
        (math.log(step), math.log(abs(value)))
        for step, value in zip(steps, values, strict=True)
        if lo < step <= hi and step > 0 and math.isfinite(value) and value != 0
    ]
    if len(points) < _FEWEST:
        return None
    t, y = torch.tensor(points, dtype=torch.float64).T
    t_off, y_off = t - t.mean(), y - y.mean()
    exponent = float(t_off @ y_off / (t_off @ t_off))
    left, total = float((y_off - exponent * t_off).square().sum()), float(y_off @ y_off)
    prefactor = math.exp(float(y.mean()) - exponent * float(t.mean()))
    return PowerLaw(exponent, prefactor, 1.0 if _constant(y) else 1.0 - left / total, len(points))


def _constant(values: Float[Tensor, " k"]) -> bool:
    """Whether values differ by rounding only."""
    spread = float(values.max() - values.min())
    return spread <= 4 * torch.finfo(torch.float64).eps * float(values.abs().max())


class Regime(NamedTuple):
    """Power laws of |a(t)| and of ||r(t)|| in one window; None with fewer than three points."""

    lo: int
    hi: int
    coordinate: PowerLaw | None
    residual: PowerLaw | None


def split_drift(gram: pca.Gram, *, normalise: bool = True) -> pca.Decomposition:
    """Split the raw drifts x_1 .. x_T along and across the whole run's backbone, which is of unit rows or of raw ones.

    Raises:
        ValueError: Nothing has moved.
    """
    rows = pca.drifts(len(gram))[1:]
    return pca.decompose(gram, rows, pca.pca(gram, rows, normalise=normalise).backbone)


def regimes(steps: Sequence[int], split: pca.Decomposition, windows: Sequence[Window] = WINDOWS) -> list[Regime]:
    """Fit power laws to a(t) and ||r(t)|| of `split_drift`, window by window; `steps` are those of x_1 .. x_T."""
    coordinate, residual = split.coordinate.tolist(), split.residual_norm.tolist()
    return [
        Regime(lo, hi, power_law(steps, coordinate, lo, hi), power_law(steps, residual, lo, hi)) for lo, hi in windows
    ]


def correlation(
    steps: Sequence[int], x: Sequence[float], y: Sequence[float], lo: int = 0, hi: int | float = math.inf
) -> float | None:
    """Pearson correlation of two series at the same steps in a window, such as p_ood and ||r||.

    Both drift with the schedule, and their values are anything but independent: it describes, it tests nothing. Pairs
    with a value that is not finite are left out. None with fewer than three points or where a series is constant.
    """
    rows = zip(steps, x, y, strict=True)
    points = [(u, v) for t, u, v in rows if lo < t <= hi and math.isfinite(u) and math.isfinite(v)]
    if len(points) < _FEWEST:
        return None
    pairs = torch.tensor(points, dtype=torch.float64).T
    return None if _constant(pairs[0]) or _constant(pairs[1]) else float(torch.corrcoef(pairs)[0, 1])


def at_steps(steps: Sequence[int], values: Sequence[float], wanted: Sequence[int]) -> list[float]:
    """Read a series at other steps, NaN where it has no value: pairs evaluations with snapshots of the same step."""
    series = dict(zip(steps, values, strict=True))
    return [series.get(step, math.nan) for step in wanted]


# ---------------------------------------------------------------------------------------------------- phases


class Phases(NamedTuple):
    """First directions, each from drifts of unit length: v_E of theta(t) - theta_0 up to a border, and after it v_L.

    v_L is of theta(t) - theta(border).
    """

    early: pca.Direction
    late: pca.Direction


def phases(gram: pca.Gram, steps: Sequence[int], border: int) -> Phases | None:
    """Fit v_E and v_L on the two sides of a border; None where a side has no snapshot, or did not move.

    The last snapshot not after the border anchors the late phase.
    """
    n, middle = len(gram), sum(step <= border for step in steps) - 1
    if not 1 <= middle < n - 1:
        return None
    sides = pca.drifts(n)[1 : middle + 1], pca.drifts(n, middle)[middle + 1 :]
    try:
        return Phases(*(pca.pca(gram, rows, normalise=True).backbone for rows in sides))
    except ValueError:  # every row of one is zero
        return None


def phase_alignment(gram: pca.Gram, steps: Sequence[int], border: int) -> float:
    """|<v_E, v_L>| of the phases before and after a border; NaN where there are none. A walk gives zero."""
    sides = phases(gram, steps, border)
    return math.nan if sides is None else abs(pca.cosine(gram, *sides))


@dataclass(frozen=True)
class AlignmentCurves:
    """How a windowed first direction leaves that of the early phase for that of the late one.

    A_E = |<v_w, v_E>| and A_L = |<v_w, v_L>| at the mean step of each window's snapshots.
    """

    centres: list[float]
    early: Float[Tensor, " W"]
    late: Float[Tensor, " W"]


def alignment_curves(gram: pca.Gram, steps: Sequence[int], border: int, width: int = 10) -> AlignmentCurves | None:
    """Compare each window's first direction with v_E and with v_L; NaN where a window did not move.

    Windows are `width` consecutive snapshots among 1 .. T, drifts from the window's own first one, unit rows. A window
    inside a phase is part of what that phase's direction was fitted to, so a walk shows no zero here either. None where
    there are no two phases or no window.
    """
    sides, n = phases(gram, steps, border), len(gram)
    if sides is None or n - 1 < width:
        return None
    rows = []
    for first in range(1, n - width + 1):
        try:
            part = pca.pca(gram, pca.drifts(n, first)[first : first + width], normalise=True)
            rows.append([abs(pca.cosine(gram, part.backbone, side)) for side in sides])
        except ValueError:  # the window did not move
            rows.append([math.nan] * 2)
    centres = [math.fsum(steps[first : first + width]) / width for first in range(1, n - width + 1)]
    return AlignmentCurves(centres, *torch.tensor(rows, dtype=torch.float64).T)


# --------------------------------------------------------------------------------------------------- summary


def summary(gram: pca.Gram, steps: Sequence[int], border: int, windows: Sequence[Window] = WINDOWS) -> dict[str, float]:
    """Single numbers of a run or of a null of it, for a table or a logger; what cannot be fitted is left out.

    `exponent_a_<lo>_<hi>`, `exponent_r_<lo>_<hi>` and their `r2_...` per window, and `early_late`, the alignment of the
    phases before and after the border.
    """
    try:
        split = split_drift(gram)
    except ValueError:  # nothing has moved
        return {}
    numbers: dict[str, float] = {}
    for regime in regimes(steps[1:], split, windows):
        for name, fit in (("a", regime.coordinate), ("r", regime.residual)):
            if fit is not None:
                numbers[f"exponent_{name}_{regime.lo}_{regime.hi}"] = fit.exponent
                numbers[f"r2_{name}_{regime.lo}_{regime.hi}"] = fit.r2
    alignment = phase_alignment(gram, steps, border)
    return numbers if math.isnan(alignment) else numbers | {"early_late": alignment}
