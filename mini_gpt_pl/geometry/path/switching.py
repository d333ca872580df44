r"""Peaks and troughs of a metric, and where the weights go between them.

A metric that swings during training has peaks and troughs; a switch is a peak and the first trough after it. Its
direction v_sw ~ theta(peak) - theta(trough) is a sum of increments, so its cosine with the backbone, its energy in the
later principal components, its share in each parameter group and its cosines with other switches are algebra on the
Gram matrix of `trajectory`.

Any two points of a path have a direction, and a longer stretch lies closer to the backbone than a shorter one, so no
number of a switch means anything alone: each comes with its percentile among stretches of the same length in which
nothing switched.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mini_gpt_pl.geometry.path import pca
from mini_gpt_pl.geometry.path.trajectory import Trajectory

# Metrics are float32 as a rule, so that a prominence of exactly the threshold may come out a hair below it.
_TOLERANCE = 1e-6
# PC1 to PC6: the backbone, and the components whose share of a switch is reported.
_LEADING = 6


# ------------------------------------------------------------------------------------------ peaks and troughs


@dataclass(frozen=True)
class Event:
    """A peak or a trough of a series: its index there, its optimizer step, and its value.

    `declared` is the index of the later value that made it certain.
    """

    kind: Literal["peak", "trough"]
    index: int
    step: int
    value: float
    declared: int


def events(steps: Sequence[int], values: Sequence[float], prominence: float = 0.03, reach: int = 3) -> list[Event]:
    """Find peaks and troughs of a series, in its order, each with the moment from which it was certain.

    Value i is a peak if it is strictly above both neighbours and
    v_i - max(min of the `reach` values before, min of the `reach` values after) >= prominence, with fewer values near
    the ends; a trough is its mirror image. The first and the last value are neither. A later value can only lower the
    minimum of the values after, so that prominence only grows: what holds with the values so far holds for ever, and is
    declared at once.

    Raises:
        ValueError: Steps and values differ in number, or a value is not finite.
    """
    if len(steps) != len(values):
        raise ValueError(f"{len(values)} values for {len(steps)} steps")
    if not all(map(math.isfinite, values)):
        raise ValueError("the series holds values that are not finite")
    kinds: dict[Literal["peak", "trough"], Sequence[float]] = {"peak": values, "trough": [-value for value in values]}
    extremes = []
    for index in range(1, len(values) - 1):
        for kind, series in kinds.items():
            declared = _declared(series, index, prominence, reach)
            if declared is not None:
                extremes.append(Event(kind, index, steps[index], values[index], declared))
    return extremes


def _declared(values: Sequence[float], index: int, prominence: float, reach: int) -> int | None:
    """Index of the first later value with which value `index` is a peak; None if it is none."""
    here = values[index]
    if not values[index - 1] < here > values[index + 1]:
        return None
    floor_before = min(values[max(0, index - reach) : index])
    for last in range(index + 1, min(index + reach, len(values) - 1) + 1):
        floor_after = min(values[index + 1 : last + 1])
        if here - max(floor_before, floor_after) >= prominence - _TOLERANCE:
            return last
    return None


@dataclass(frozen=True)
class Switch:
    """A peak and the first trough after it; `declared` is the index of the value that made the pair certain."""

    peak: Event
    trough: Event
    declared: int


def switches(extremes: Sequence[Event], reach: int = 3) -> list[Switch]:
    """Pair each peak with the first later trough; peaks without a trough between them share one.

    With a reach above 3, a shallow trough between the two could still be recognised after the later one has been: the
    pair is certain only when that can no longer happen. Events and reach are those of `events`.
    """
    pairs = []
    for peak in [event for event in extremes if event.kind == "peak"]:
        trough = next((event for event in extremes if event.kind == "trough" and event.index > peak.index), None)
        if trough is not None:
            # Two troughs are at least two values apart, and one is settled once `reach` values have followed it.
            pairs.append(Switch(peak, trough, max(peak.declared, trough.declared, trough.index - 2 + reach)))
    return pairs


# ------------------------------------------------------------------------------------ stretches of a trajectory


class Interval(NamedTuple):
    """A stretch of the trajectory, by the indices of the snapshots at its ends; `first` < `last`."""

    first: int
    last: int


def interval_of(switch: Switch, steps: Sequence[int]) -> Interval | None:
    """Return the snapshots at, or last before, the two ends of a switch; None if they are one and the same.

    Also None where the peak comes before all snapshots, whose steps are given.
    """
    first, last = (bisect.bisect_right(steps, event.step) - 1 for event in (switch.peak, switch.trough))
    return Interval(first, last) if 0 <= first < last else None


def switch_direction(n: int, index_from: int, index_to: int) -> pca.Direction:
    """Coefficients of theta(index_to) - theta(index_from) over the basis (theta_0, d_1, ..., d_{n-1}).

    A sum of increments, and minus that sum where `index_to` is the earlier one. Not scaled to unit length.

    Example:
        >>> switch_direction(4, 1, 3)
        tensor([0., 0., 1., 1.], dtype=torch.float64)
    """
    direction = torch.zeros(n, dtype=torch.float64)
    first, last = sorted((index_from, index_to))
    direction[first + 1 : last + 1] = 1.0 if index_from < index_to else -1.0
    return direction


def control_intervals(
    steps: Sequence[int], like: Interval, avoid: Sequence[Interval], limit: int = 50
) -> list[Interval]:
    """Stretches as long as another, in optimizer steps, that share no increment with it or with any switch.

    Equal in steps rather than in snapshots: where snapshots lie more densely, as many of them are a shorter way. Of
    more than `limit` stretches, evenly chosen ones.
    """
    at = {step: index for index, step in enumerate(steps)}
    length = steps[like.last] - steps[like.first]
    stretches = [Interval(i, at[step + length]) for i, step in enumerate(steps) if step + length in at]
    free = [s for s in stretches if not any(overlap(s, other) for other in (like, *avoid))]
    if len(free) <= limit:
        return free
    return [free[round(k * (len(free) - 1) / max(1, limit - 1))] for k in range(limit)]


def overlap(a: Interval, b: Interval) -> bool:
    """Whether two stretches share an increment."""
    return a.first < b.last and b.first < a.last


# --------------------------------------------------------------------------------------- measuring a stretch


class Axes:
    """Leading principal directions of the first snapshots of a growing trajectory, each set computed once.

    What a run's first k snapshots say does not change as it goes on, so one instance serves a whole run.
    """

    def __init__(self) -> None:
        self._directions: dict[tuple[str | None, int], Float[Tensor, "K k"] | None] = {}

    def of(self, trajectory: Trajectory, group: str | None, snapshots: int) -> Float[Tensor, "K k"] | None:
        """Coefficients of PC1 to PC6 (raw rows from theta_0) of the first snapshots; None if nothing had moved."""
        key = (group, snapshots)
        if key not in self._directions:
            gram = trajectory.gram(group)[:snapshots, :snapshots]
            try:
                self._directions[key] = pca.pca(gram, pca.drifts(snapshots)[1:]).directions[:_LEADING]
            except ValueError:  # every row is zero
                self._directions[key] = None
        return self._directions[key]


@dataclass(frozen=True)
class Stretch:
    """How the displacement over a stretch lies, as a unit vector v_sw ~ theta(first) - theta(last).

    Numbers are NaN where there is nothing to compare with: no past, or no displacement.

    Args:
        cosine: <v_sw, v_b>, with its sign.
        energy: Sum of <v_sw, v_j>^2 over PCs 2 to 6.
        energy_across: The same for v_sw with its part along v_b projected out and scaled to unit length.
        share: ||.||^2 of this parameter group over that of the whole selection.
    """

    cosine: float
    energy: float
    energy_across: float
    share: float

    @property
    def transverse(self) -> float:
        """Share across the backbone, 1 - cos^2."""
        return 1.0 - self.cosine**2


def measure(
    trajectory: Trajectory,
    stretches: Sequence[Interval],
    axes: Axes,
    *,
    group: str | None = None,
    past: bool,
) -> list[Stretch]:
    """Place displacements in the principal directions of a parameter group, or of the whole selection for None.

    With `past`, each displacement is compared with the directions of the snapshots up to its beginning, which know
    nothing of it, so that chance gives a cosine of zero; else with those of all snapshots of the run (so far). `axes`
    is for all calls of one run.
    """
    gram, whole = trajectory.gram(group), trajectory.gram()
    placed = []
    for stretch in stretches:
        directions = axes.of(trajectory, group, stretch.first + 1 if past else len(gram))
        row = switch_direction(len(gram), stretch.last, stretch.first)
        square, total = float(pca.inner(gram, row, row)), float(pca.inner(whole, row, row))
        share = square / total if total > 0 else math.nan
        if directions is None or square <= 0:
            placed.append(Stretch(math.nan, math.nan, math.nan, share))
            continue
        coordinates = directions @ (gram @ row)[: directions.shape[1]] / math.sqrt(square)
        cosine, energy = float(coordinates[0]), float(coordinates[1:].square().sum())
        left = 1.0 - cosine**2
        # Of a displacement along the backbone itself nothing is left but rounding.
        placed.append(Stretch(cosine, energy, energy / left if left > 1e-12 else 0.0, share))
    return placed


def percentile(value: float, controls: Sequence[float]) -> float:
    """Share of the controls below a value, ties counted half; NaN without controls. On chance alone it is uniform."""
    numbers = [control for control in controls if not math.isnan(control)]
    if math.isnan(value) or not numbers:
        return math.nan
    below = sum(control < value for control in numbers) + 0.5 * sum(control == value for control in numbers)
    return below / len(numbers)


# ------------------------------------------------------------------------------------------ switches and controls


@dataclass(frozen=True)
class SwitchReport:
    """A switch in one parameter group, beside controls: stretches of equal length without a switch.

    The number of controls that could be measured, the percentiles of the switch's |cos|, energies and share among them
    (of the share NaN for the whole selection, where it is always 1), and the controls' mean |cos| and share.
    """

    stretch: Stretch
    controls: int
    cosine_percentile: float
    energy_percentile: float
    energy_across_percentile: float
    share_percentile: float
    control_cosine: float
    control_share: float


def compare(stretch: Stretch, controls: Sequence[Stretch], *, group: str | None = None) -> SwitchReport:
    """Put a switch beside its controls."""
    cosines = [abs(control.cosine) for control in controls]
    shares = [control.share for control in controls]
    return SwitchReport(
        stretch=stretch,
        controls=sum(not math.isnan(cosine) for cosine in cosines),
        cosine_percentile=percentile(abs(stretch.cosine), cosines),
        energy_percentile=percentile(stretch.energy, [control.energy for control in controls]),
        energy_across_percentile=percentile(stretch.energy_across, [control.energy_across for control in controls]),
        share_percentile=math.nan if group is None else percentile(stretch.share, shares),
        control_cosine=_mean(cosines),
        control_share=_mean(shares),
    )


def report(
    trajectory: Trajectory,
    stretch: Interval,
    avoid: Sequence[Interval],
    axes: Axes,
    *,
    past: bool,
    limit: int = 50,
) -> dict[str | None, SwitchReport]:
    """Describe one switch per parameter group, and for the whole selection under None, as `measure` does.

    At most `limit` controls come from the trajectory given, early and late ones alike, each with its own past; none
    contains one of the switches in `avoid`. Where a whole run turns slowly, an extreme percentile may say no more than
    when in the run the switch happened.
    """
    controls = control_intervals(trajectory.steps, stretch, avoid, limit)
    reports: dict[str | None, SwitchReport] = {}
    for group in (None, *trajectory.groups):
        own, *others = measure(trajectory, [stretch, *controls], axes, group=group, past=past)
        reports[group] = compare(own, others, group=group)
    return reports


def effective_groups(shares: Sequence[float]) -> float:
    """Number of groups that a displacement is spread over, 1 / sum share^2: 1 if it is all in one."""
    square = sum(share**2 for share in shares)
    return 1.0 / square if square > 0 else math.nan


def pairwise_cosines(gram: pca.Gram, stretches: Sequence[Interval]) -> Float[Tensor, "S S"]:
    """Cosines of displacements with one another; zero where one vanishes.

    Stretches that overlap share increments and are alike for that reason alone: see `mean_cosine`.
    """
    if not stretches:
        return torch.zeros(0, 0, dtype=torch.float64)
    rows = torch.stack([switch_direction(len(gram), last, first) for first, last in stretches])
    products = rows @ gram @ rows.T
    lengths = products.diagonal().clamp_min(0.0).sqrt()
    scale = lengths[:, None] * lengths
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0)


def mean_cosine(gram: pca.Gram, stretches: Sequence[Interval]) -> float:
    """Mean |cos| over the pairs of displacements that share no increment; NaN if there is no such pair."""
    cosines = pairwise_cosines(gram, stretches).abs().tolist()
    return _mean(
        [cosines[i][j] for i, a in enumerate(stretches) for j, b in enumerate(stretches[:i]) if not overlap(a, b)]
    )


def control_mean_cosine(trajectory: Trajectory, stretches: Sequence[Interval], limit: int = 50) -> float:
    """`mean_cosine` with each switch replaced by its controls in turn: mean over switches, then over controls.

    A control shares no increment with the other switches either, so it is compared with the switches as they are. Each
    switch has at most `limit` of them.
    """
    gram, means = trajectory.gram(), []
    for stretch in stretches:
        rest = [other for other in stretches if not overlap(other, stretch)]
        for control in control_intervals(trajectory.steps, stretch, stretches, limit) if rest else []:
            means.append(float(pairwise_cosines(gram, [control, *rest])[0, 1:].abs().mean()))
    return _mean(means)


def _mean(values: Sequence[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is left."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
