"""What the tables measure of a path, as functions of its Gram matrix, so that a null is the same of another matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mini_gpt_pl.geometry.path import growth, pca
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.statistics import mean

PHASES = ("early", "middle", "late")
_BORDERS = (0.2, 0.6)  # of the run: steps 2,000 and 6,000 of 10,000


def spacing_note(trajectory: Trajectory) -> str:
    """Say how many snapshots there are and how far apart, which PC1 and k95 depend on."""
    spans = [later - earlier for earlier, later in itertools.pairwise(trajectory.steps)]
    apart = f"every {spans[0]:,} steps" if len(set(spans)) == 1 else f"{min(spans):,} to {max(spans):,} steps apart"
    return f"{len(spans)} snapshots after the start, {apart}, to step {trajectory.steps[-1]:,}."


# ----------------------------------------------------------------------------------------------------- updates


def phase_of(middle: float, length: int) -> str:
    """Phase of an interval by its midpoint: before 0.2 of the length, to 0.6, after."""
    early, late = phase_borders(length)
    return PHASES[0] if middle < early else PHASES[1] if middle <= late else PHASES[2]


def phase_borders(length: int) -> tuple[int, int]:
    """Steps at which the phases change: 2,000 and 6,000 of 10,000."""
    early, late = _BORDERS
    return round(early * length), round(late * length)


def update_statistics(gram: Gram, steps: Sequence[int], length: int) -> dict[str, float]:
    """Cosines of updates with the backbone by phase, and where their sign flips.

    With the whole run's raw v_b, a(T) > 0: `<phase>` means of |C|, `<phase>_signed` means of C, `flip` the end of the
    first interval with C < 0. With the v_b of the snapshots before: `<phase>_past` means of C. `mean` and `mean_past`
    are over all intervals. What a run has no interval for is left out.

    Args:
        gram: H over evenly spaced snapshots.
        steps: Of those snapshots.
        length: Of the whole schedule, which the phases are shares of.
    """
    whole = pca.update_alignment(gram, pca.pca(gram, pca.drifts(len(gram))[1:]).backbone).tolist()
    past = pca.past_update_alignment(gram).tolist()
    middles = [(before + after) / 2 for before, after in itertools.pairwise(steps)]
    found = {"mean": mean([abs(c) for c in whole]), "mean_past": mean(past)}
    for phase in PHASES:
        inside = [index for index, middle in enumerate(middles) if phase_of(middle, length) == phase]
        found[phase] = mean([abs(whole[index]) for index in inside])
        found[f"{phase}_signed"] = mean([whole[index] for index in inside])
        found[f"{phase}_past"] = mean([past[index] for index in inside])
    found["flip"] = next((float(step) for step, c in zip(steps[1:], whole, strict=True) if c < 0), math.nan)
    return {name: value for name, value in found.items() if not math.isnan(value)}


# ------------------------------------------------------------------------------------------ windows and fractions


def rolling_statistics(gram: Gram, width: int = 10) -> dict[str, float]:
    """Extremes of a rolling window: shares of PC1 and turning, with unit rows from the window's first snapshot."""
    if len(gram) <= width + 1:
        return {}
    turning = pca.rolling_self_anchored(gram, width)
    return {
        "pc1_low": float(turning.pc1.min()),
        "pc1_high": float(turning.pc1.max()),
        "turning_low": float(turning.cosines.min()),
    }


# -------------------------------------------------------------------------------------------- along and across


def split_statistics(gram: Gram, steps: Sequence[int]) -> dict[str, float]:
    """Share of the drift along the backbone, for raw and unit rows, and where a and ||r|| are largest.

    `<rows>_last` and `<rows>_mean` are a^2 / ||x||^2 at the last snapshot and on average over snapshots, with v_b of
    raw or of unit rows; `highest_a` and `highest_r` are steps, with unit rows as in the original's CSV.
    """
    found = {}
    for name, normalise in (("raw", False), ("unit", True)):
        split = growth.split_drift(gram, normalise=normalise)
        found[f"{name}_last"] = float(split.fraction[-1])
        found[f"{name}_mean"] = float(split.fraction.mean())
    found["highest_a"] = float(steps[1 + int(split.coordinate.abs().argmax())])
    found["highest_r"] = float(steps[1 + int(split.residual_norm.argmax())])
    return found
