"""What the tables measure of a recorded path, each number beside that of its two nulls.

Everything is algebra on the Gram matrix, so a null is the same function of another matrix.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path import growth, nulls, pca
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.geometry.path.pca import Gram
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.calibration import calibrate_run
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.runs.folder import Run

SPAN = 200
"""Optimizer steps of the paper's updates."""

PHASES = ("early", "middle", "late")
_BORDERS = (0.2, 0.6)  # of the run: steps 2,000 and 6,000 of 10,000

Described = Mapping[str, float]


def against_nulls(
    gram: Gram, survival: Sequence[float], describe: Callable[[Gram], Described]
) -> dict[str, Calibrated]:
    """Put numbers of a path beside those of the walk and of the decaying walk; what is missing in a null is NaN there.

    Args:
        gram: H of the run.
        survival: Share of theta_0 that decay alone leaves, per snapshot.
        describe: Numbers of any H, by name.
    """
    measured = describe(gram)
    free, decaying = describe(nulls.walk(gram)), describe(nulls.decaying_walk(gram, survival))
    return {
        name: Calibrated(value, free.get(name, math.nan), decaying.get(name, math.nan))
        for name, value in measured.items()
    }


@dataclass(frozen=True)
class RecordedPath:
    """The recorded path of a run, with what several tables need of it computed once.

    Args:
        run: The run; it must have a trajectory.
        bootstrap: Resamples behind the 95 % intervals.
        name: What the run is called; its folder's name if empty.
    """

    run: Run
    bootstrap: int = 200
    name: str = ""
    _known: dict[str | None, dict[str, Calibrated] | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        """What the run is called."""
        return self.name or self.run.path.resolve().name

    @property
    def trajectory(self) -> Trajectory:
        """Of the run."""
        return self.run.trajectory

    @property
    def trunk(self) -> str:
        """Name of the whole selection."""
        return self.run.trunk

    @property
    def last(self) -> int:
        """Step of the last snapshot."""
        return self.trajectory.steps[-1]

    @property
    def length(self) -> int:
        """Steps that the run was meant to last, by its schedule: phases and windows are shares of it.

        A run that was broken off, or stopped early, has the phases of the whole.
        """
        return max(self.last, int(facts(self.run)["schedule length"] or 0))

    @property
    def moved(self) -> bool:
        """Whether there is a path to speak of: three snapshots at least, and weights that moved."""
        return self.calibrated(None) is not None

    @property
    def parts(self) -> dict[str, str | None]:
        """Groups that moved and the whole selection: label -> name of the group, None for the whole."""
        groups: dict[str, str | None] = {name: name for name in self.trajectory.groups}
        # A selection without groups is one group, and its own whole.
        labelled = ({} if len(groups) == 1 else groups) | {self.trunk: None}
        return {label: group for label, group in labelled.items() if self.calibrated(group) is not None}

    def calibrated(self, group: str | None) -> dict[str, Calibrated] | None:
        """Every statistic beside its nulls; None for weights that never moved, or hardly any snapshots."""
        if group not in self._known:
            try:
                self._known[group] = calibrate_run(self.run, group, self.bootstrap)
            except UserError:
                self._known[group] = None
        return self._known[group]

    def thinned(self) -> Trajectory:
        """The path seen every `SPAN` steps, as the paper's updates are; see `update_span`."""
        return thin(self.trajectory, update_span(self.trajectory.steps))


# ------------------------------------------------------------------------------------------------- even spacing


def update_span(steps: Sequence[int]) -> int:
    """Steps between the snapshots that updates are taken of: 200 where there are such, else the commonest distance."""
    grid = {step - steps[0] for step in steps}
    if sum(step % SPAN == 0 for step in grid) > 3:
        return SPAN
    common = Counter(later - earlier for earlier, later in itertools.pairwise(steps))
    return max(common, key=lambda span: (common[span], span)) if common else 1


def thin(trajectory: Trajectory, span: int) -> Trajectory:
    """Keep the snapshots a multiple of `span` after the first, as if no other had been taken.

    Args:
        trajectory: Of any spacing.
        span: In optimizer steps.
    """
    steps = trajectory.steps
    kept = [index for index, step in enumerate(steps) if (step - steps[0]) % span == 0]
    if len(kept) == len(steps):
        return trajectory
    basis = torch.zeros(len(kept), len(steps), dtype=torch.float64)
    basis[0, 0] = 1.0
    for row, (before, at) in enumerate(itertools.pairwise(kept), 1):
        basis[row, before + 1 : at + 1] = 1.0
    return Trajectory(
        trajectory.fingerprint,
        trajectory.groups,
        trajectory.dims,
        [steps[index] for index in kept],
        basis @ trajectory.grams @ basis.T,
        [trajectory.survival[index] for index in kept],
    )


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
    found = {"mean": _mean([abs(c) for c in whole]), "mean_past": _mean(past)}
    for phase in PHASES:
        inside = [index for index, middle in enumerate(middles) if phase_of(middle, length) == phase]
        found[phase] = _mean([abs(whole[index]) for index in inside])
        found[f"{phase}_signed"] = _mean([whole[index] for index in inside])
        found[f"{phase}_past"] = _mean([past[index] for index in inside])
    found["flip"] = next((float(step) for step, c in zip(steps[1:], whole, strict=True) if c < 0), math.nan)
    return {name: value for name, value in found.items() if not math.isnan(value)}


# ----------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class Window:
    """PCA of the drifts inside a window of steps, each from the window's first snapshot and of unit length.

    Args:
        lo: Step of the first snapshot, from which drifts are taken.
        hi: Step of the last.
        rows: Number of drifts.
        numbers: pc1, k95, k99 and drift (||theta(hi) - theta(lo)||), each beside its nulls.
        decay: How far weight decay alone moves theta_0 over the window, ||theta_0|| (S(lo) - S(hi)).
    """

    lo: int
    hi: int
    rows: int
    numbers: dict[str, Calibrated]
    decay: float


def window(trajectory: Trajectory, lo: int, hi: int, group: str | None = None) -> Window | None:
    """Measure a window of a path.

    Args:
        trajectory: Of the run.
        lo: First step; there must be a snapshot.
        hi: Last step; there must be a snapshot.
        group: A parameter group; the whole selection for None.

    Returns:
        The window, or None where a snapshot is missing, nothing lies between, or nothing moved.
    """
    steps = trajectory.steps
    if lo not in steps or hi not in steps or not lo < hi:
        return None
    first, last = steps.index(lo), steps.index(hi)
    gram = trajectory.gram(group)

    def describe(h: Gram) -> dict[str, float]:
        rows = pca.drifts(len(h), first)[first + 1 : last + 1]
        parts = pca.pca(h, rows, normalise=True)
        drift = float(pca.norms(h, rows[-1:]))
        k95, k99 = (float(parts.components_for(share)) for share in (0.95, 0.99))
        return {"pc1": parts.pc1, "k95": k95, "k99": k99, "drift": drift}

    try:
        numbers = against_nulls(gram, trajectory.survival, describe)
    except ValueError:  # nothing moved
        return None
    decay = float(gram[0, 0].clamp_min(0).sqrt()) * (trajectory.survival[first] - trajectory.survival[last])
    return Window(lo, hi, last - first, numbers, decay)


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


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan
