r"""How the backbone coordinate and the residual grow, and how the direction of an early phase sits to a late one's.

Everything comes from the Gram matrix of `trajectory`, so the same functions give the null: hand them the Gram matrix of
a walk. That is not idle. Decoupled weight decay under a linear warm-up alone moves weights as t^2, and exponents fitted
to one run describe that run's schedule as much as its geometry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca

Window = tuple[int, int]

# Optimizer steps lo < t <= hi of the windows of the paper's 10,000-step runs.
WINDOWS: tuple[Window, ...] = ((0, 2000), (2000, 4000), (0, 4000), (4000, 6000), (4000, 10000), (6000, 10000))
_FEWEST = 3


def scaled_windows(last: int) -> tuple[Window, ...]:
    """`WINDOWS` for a run of another length: the same shares of the run."""
    return tuple((round(lo * last / 10_000), round(hi * last / 10_000)) for lo, hi in WINDOWS)


# ------------------------------------------------------------------------------------------------ power laws


@dataclass(frozen=True)
class PowerLaw:
    """A fit |y| = prefactor * t^exponent.

    Args:
        exponent: Slope of ln |y| on ln t.
        prefactor: In the units of y.
        r2: Share of the variance of ln |y| that the line explains; 1 where there is no variance.
        points: Number of points.
    """

    exponent: float
    prefactor: float
    r2: float
    points: int


def power_law(steps: Sequence[int | float], values: Sequence[float], lo: int, hi: int | float) -> PowerLaw | None:
    """Fit a power law by least squares of ln |y| on ln t over lo < t <= hi.

    Args:
        steps: t, such as optimizer steps.
        values: y; those that are zero or not finite are left out.
        lo: Open end of the window.
        hi: Closed end of the window.

    Returns:
        The fit, or None with fewer than three points.
    """
    kept = [
        (math.log(step), math.log(abs(value)))
        for step, value in zip(steps, values, strict=True)
        if lo < step <= hi and step > 0 and math.isfinite(value) and value != 0
    ]
    if len(kept) < _FEWEST:
        return None
    t, y = torch.tensor(kept, dtype=torch.float64).T
    t_off, y_off = t - t.mean(), y - y.mean()
    exponent = float(t_off @ y_off / (t_off @ t_off))
    left, total = float((y_off - exponent * t_off).square().sum()), float(y_off @ y_off)
    prefactor = math.exp(float(y.mean()) - exponent * float(t.mean()))
    return PowerLaw(exponent, prefactor, 1.0 if _constant(y) else 1.0 - left / total, len(kept))


def _constant(values: Float[Tensor, " k"]) -> bool:
    """Whether values differ by rounding only."""
    spread = float(values.max() - values.min())
    return spread <= 4 * torch.finfo(torch.float64).eps * float(values.abs().max())


@dataclass(frozen=True)
class Regime:
    """Growth in one window.

    Args:
        lo: Open end of the window, in optimizer steps.
        hi: Closed end.
        coordinate: Fit of |a(t)|; None with fewer than three points.
        residual: Fit of ||r(t)||.
    """

    lo: int
    hi: int
    coordinate: PowerLaw | None
    residual: PowerLaw | None


def split_drift(gram: pca.Gram, *, normalise: bool = True) -> pca.Decomposition:
    """Split the drifts x_1 .. x_T along and across the whole run's backbone.

    Args:
        gram: H.
        normalise: Fit the backbone to rows of unit length; a and r are those of the raw drift either way.

    Raises:
        ValueError: Nothing has moved.
    """
    rows = pca.drifts(len(gram))[1:]
    return pca.decompose(gram, rows, pca.pca(gram, rows, normalise=normalise).backbone)


def regimes(steps: Sequence[int], split: pca.Decomposition, windows: Sequence[Window] = WINDOWS) -> list[Regime]:
    """Fit power laws to a(t) and ||r(t)||, window by window.

    Args:
        steps: Of the rows that were split, x_1 .. x_T.
        split: From `split_drift`.
        windows: (lo, hi) for lo < t <= hi.
    """
    coordinate, residual = split.coordinate.tolist(), split.residual_norm.tolist()
    return [
        Regime(lo, hi, power_law(steps, coordinate, lo, hi), power_law(steps, residual, lo, hi)) for lo, hi in windows
    ]


@dataclass(frozen=True)
class Rates:
    """Speeds along and across a direction, per optimizer step, of the intervals that end at snapshots 1 .. T.

    Args:
        along: (a_i - a_{i-1}) / dt, signed.
        across: ||r_i - r_{i-1}|| / dt.
    """

    along: Float[Tensor, " T"]
    across: Float[Tensor, " T"]


def rates(gram: pca.Gram, steps: Sequence[int], direction: pca.Direction) -> Rates:
    """Measure how fast the weights move along a unit direction and across it.

    Args:
        gram: H.
        steps: Of all snapshots, theta_0's included.
        direction: Coefficients of a unit vector.
    """
    span = torch.tensor(steps, dtype=torch.float64).diff()
    split = pca.decompose(gram, torch.eye(len(gram), dtype=torch.float64)[1:], direction)
    return Rates(split.coordinate / span, split.residual_norm / span)


def correlation(
    steps: Sequence[int], x: Sequence[float], y: Sequence[float], lo: int = 0, hi: int | float = math.inf
) -> float | None:
    """Pearson correlation of two series over lo < t <= hi, such as p_ood and ||r||.

    Both drift with the schedule, and their values are anything but independent: it describes, it tests nothing.

    Args:
        steps: t of both series, in optimizer steps.
        x: Pairs with a value that is not finite are left out.
        y: As long as x.
        lo: Open end of the window.
        hi: Closed end of the window.

    Returns:
        The coefficient, or None with fewer than three points or where a series is constant.
    """
    rows = zip(steps, x, y, strict=True)
    kept = [(u, v) for t, u, v in rows if lo < t <= hi and math.isfinite(u) and math.isfinite(v)]
    if len(kept) < _FEWEST:
        return None
    pairs = torch.tensor(kept, dtype=torch.float64).T
    return None if _constant(pairs[0]) or _constant(pairs[1]) else float(torch.corrcoef(pairs)[0, 1])


def at_steps(steps: Sequence[int], values: Sequence[float], wanted: Sequence[int]) -> list[float]:
    """Read a series at other steps, NaN where it has no value: pairs evaluations with snapshots of the same step."""
    known = dict(zip(steps, values, strict=True))
    return [known.get(step, math.nan) for step in wanted]


# ---------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Phases:
    """First directions before and after a border, each from drifts of unit length.

    Args:
        early: v_E, of theta(t) - theta_0 up to the border.
        late: v_L, of theta(t) - theta(border) after it.
    """

    early: pca.Direction
    late: pca.Direction


def phases(gram: pca.Gram, steps: Sequence[int], border: int) -> Phases | None:
    """Fit v_E and v_L on the two sides of a border.

    Args:
        gram: H.
        steps: Of all snapshots, theta_0's included.
        border: In optimizer steps; the last snapshot not after it anchors the late phase.

    Returns:
        The two directions, or None where a side has no snapshot, or did not move.
    """
    n, middle = len(gram), sum(step <= border for step in steps) - 1
    if not 1 <= middle < n - 1:
        return None
    early = _first(gram, pca.drifts(n)[1 : middle + 1])
    late = _first(gram, pca.drifts(n, middle)[middle + 1 :])
    return None if early is None or late is None else Phases(early, late)


def phase_alignment(gram: pca.Gram, steps: Sequence[int], border: int) -> float:
    """|<v_E, v_L>| of the phases before and after a border; NaN where there are none. A walk gives zero."""
    found = phases(gram, steps, border)
    return math.nan if found is None else abs(pca.cosine(gram, found.early, found.late))


@dataclass(frozen=True)
class AlignmentCurves:
    """How a windowed first direction leaves that of the early phase for that of the late one.

    Args:
        centres: Mean step of each window's snapshots.
        early: A_E = |<v_w, v_E>|.
        late: A_L = |<v_w, v_L>|.
        pc1: Share of the window's first component.
    """

    centres: list[float]
    early: Float[Tensor, " W"]
    late: Float[Tensor, " W"]
    pc1: Float[Tensor, " W"]


def alignment_curves(gram: pca.Gram, steps: Sequence[int], border: int, width: int = 10) -> AlignmentCurves | None:
    """Compare each window's first direction with v_E and with v_L.

    Windows are `width` consecutive snapshots among 1 .. T, drifts from the window's own first one, unit rows. A window
    inside a phase is part of what that phase's direction was fitted to, so a walk shows no zero here either.

    Args:
        gram: H.
        steps: Of all snapshots, theta_0's included.
        border: Between the phases, in optimizer steps.
        width: Snapshots a window.

    Returns:
        The curves (NaN where a window did not move), or None where there are no two phases or no window.
    """
    found, n = phases(gram, steps, border), len(gram)
    if found is None or n - 1 < width:
        return None
    rows = []
    for first in range(1, n - width + 1):
        window = pca.drifts(n, first)[first : first + width]
        centre = math.fsum(steps[first : first + width]) / width
        rows.append((centre, *_against(gram, window, found)))
    centres, early, late, pc1 = zip(*rows, strict=True)
    return AlignmentCurves(list(centres), *(torch.tensor(curve, dtype=torch.float64) for curve in (early, late, pc1)))


def _against(gram: pca.Gram, window: pca.Rows, found: Phases) -> tuple[float, float, float]:
    """|cos| of a window's first direction with v_E and v_L, and its share."""
    try:
        part = pca.pca(gram, window, normalise=True)
    except ValueError:  # the window did not move
        return math.nan, math.nan, math.nan
    early, late = (abs(pca.cosine(gram, part.backbone, side)) for side in (found.early, found.late))
    return early, late, part.pc1


def _first(gram: pca.Gram, rows: pca.Rows) -> pca.Direction | None:
    try:
        return pca.pca(gram, rows, normalise=True).backbone
    except ValueError:  # every row is zero
        return None


# --------------------------------------------------------------------------------------------------- summary


def summary(gram: pca.Gram, steps: Sequence[int], border: int, windows: Sequence[Window] = WINDOWS) -> dict[str, float]:
    """Single numbers of a run, for a table or a logger; what cannot be fitted is left out.

    `exponent_a_<lo>_<hi>`, `exponent_r_<lo>_<hi>` and their `r2_...` per window, and `early_late`, the alignment of the
    two phases.

    Args:
        gram: H of the run, or of a null of it.
        steps: Of all snapshots, theta_0's included.
        border: Between the phases, in optimizer steps.
        windows: Of the power laws.
    """
    found: dict[str, float] = {}
    try:
        split = split_drift(gram)
    except ValueError:  # nothing has moved
        return found
    for regime in regimes(steps[1:], split, windows):
        for name, fit in (("a", regime.coordinate), ("r", regime.residual)):
            if fit is not None:
                found[f"exponent_{name}_{regime.lo}_{regime.hi}"] = fit.exponent
                found[f"r2_{name}_{regime.lo}_{regime.hi}"] = fit.r2
    alignment = phase_alignment(gram, steps, border)
    return found if math.isnan(alignment) else found | {"early_late": alignment}
