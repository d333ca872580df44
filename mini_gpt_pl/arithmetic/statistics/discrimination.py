r"""Whether an onset says anything: against runs that never generalise, against other clocks, and with honest units.

An early warning must come in the runs that generalise and not in the others, must say more about *when* than anything
else that changes early, and must do so in more independent runs than luck allows. Runs that share an operation, a split
or a threshold are not independent: cluster labels make them one unit.

Steps that were never reached are None; in a ranking they come after all others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from mini_gpt_pl.arithmetic.statistics.onset import Number, lead
from mini_gpt_pl.errors import UserError

Steps = Sequence[Number | None]
Clusters = Sequence[Hashable]
# Up to this number of relabellings all of them are counted, beyond it some are drawn.
_EXACT = 20_000


@dataclass(frozen=True)
class Discrimination:
    """How well an onset tells two kinds of runs apart.

    Args:
        auc: Chance that a run that generalises has its onset before one that does not; ties, both never among them,
            count half.
        p: Share of relabellings of the units with an AUC as far from 1/2, the measured one among them.
        smallest: The least p that so few units can have.
        units: Number of independent units.
    """

    auc: float
    p: float
    smallest: float
    units: int


def auc(
    generalising: Steps,
    others: Steps,
    clusters: tuple[Clusters, Clusters] | None = None,
    *,
    draws: int = 9999,
    seed: int = 0,
) -> Discrimination:
    """Compare the onsets of runs that generalise with those of runs that do not (Mann and Whitney 1947).

    Args:
        generalising: Onset of each run that generalises.
        others: Onset of each run that does not.
        clusters: Unit of each run of the two, such as its operation; labels are exchanged between whole units. Every
            run is a unit for None.
        draws: Relabellings where there are too many to go through all of them.
        seed: Of the relabellings.

    Raises:
        UserError: There are no runs of one kind, or a unit has runs of both.
    """
    if not generalising or not others:
        raise UserError("runs that generalise are compared with runs that do not: give both at least one")
    times = np.array([math.inf if t is None else t for t in [*generalising, *others]])
    names = _units([*clusters[0], *clusters[1]] if clusters else None, len(times))
    if both := set(names[: len(generalising)]) & set(names[len(generalising) :]):
        raise UserError(
            f"unit {min(map(str, both))} has runs of both kinds, so exchanging labels between units means nothing: "
            "split the unit, or leave it out"
        )
    units = list(dict.fromkeys(names))
    member = np.array([units.index(name) for name in names])
    chosen = len(set(names[: len(generalising)]))
    earlier = (times[:, None] < times) + 0.5 * (times[:, None] == times)

    def area(labels: Sequence[int]) -> float:
        inside = np.isin(member, labels)
        return float(earlier[inside][:, ~inside].mean())

    value = area(range(chosen))  # units are listed in the order of the runs
    count = math.comb(len(units), chosen)
    if count <= _EXACT:
        areas = [area(labels) for labels in combinations(range(len(units)), chosen)]
    else:
        rng = np.random.Generator(np.random.Philox(key=seed))
        areas = [value, *(area(rng.permutation(len(units))[:chosen].tolist()) for _ in range(draws))]
    distance = np.abs(np.array(areas) - 0.5)
    p = float(np.mean(distance >= abs(value - 0.5) - 1e-12))
    return Discrimination(value, p, 1 / len(areas), len(units))


def _units(clusters: Clusters | None, runs: int) -> Clusters:
    """The unit of each run; every run is one for None."""
    names: Clusters = range(runs) if clusters is None else clusters
    if len(names) != runs:
        raise UserError(f"{runs} runs have {len(names)} units: name one unit for each run")
    return names


@dataclass(frozen=True)
class Clock:
    """An onset, or something that merely happens early, as a predictor of generalisation.

    Args:
        runs: Runs that generalised and in which the clock struck: those of the correlations.
        ahead: Runs among all that generalised in which it struck before.
        lead: Median lead over all that generalised; a clock that never struck has -inf.
        correlation: Of its step with the step of generalisation; NaN where either is constant.
        partial: The same, given the other clocks named as controls; NaN with too few runs.
        p: Of `partial` under permutation of residuals; NaN where that is.
    """

    runs: int
    ahead: int
    lead: float
    correlation: float
    partial: float
    p: float


def compare_clocks(
    clocks: Mapping[str, Steps], generalised: Steps, controls: Sequence[str] = (), *, draws: int = 999, seed: int = 0
) -> dict[str, Clock]:
    """Put an onset beside placebo clocks: does it lead by more, and know more of when, than they do?

    Anything that happens early leads every run. What counts is the correlation with the step of generalisation over
    runs, once the plainest clocks are known, such as train accuracy 0.99 or a level of ||theta||.

    Args:
        clocks: Step of each clock in each run, None for never.
        generalised: Step of generalisation of each run; runs without one are left out.
        controls: Clocks whose part is taken out of the others' correlations.
        draws: Permutations behind p.
        seed: Of the permutations.

    Raises:
        UserError: A control is not among the clocks.
    """
    if missing := set(controls) - set(clocks):
        raise UserError(f"there is no clock {min(missing)!r} to be given; there are {', '.join(clocks)}")
    compared = {}
    for name, struck in clocks.items():
        leads = [value for pair in zip(struck, generalised, strict=True) if (value := lead(*pair)) is not None]
        columns = [struck, generalised, *(clocks[other] for other in controls if other != name)]
        rows = [row for row in zip(*columns, strict=True) if None not in row]
        table = np.array(rows, dtype=float).reshape(len(rows), len(columns))
        partial, p = partial_correlation(table[:, 0], table[:, 1], table[:, 2:], draws=draws, seed=seed)
        ahead, median = sum(value > 0 for value in leads), statistics.median(leads) if leads else math.nan
        compared[name] = Clock(len(rows), ahead, median, _correlation(table[:, 0], table[:, 1]), partial, p)
    return compared


Column = np.ndarray[tuple[int], np.dtype[np.float64]]
Table = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def partial_correlation(
    x: Column, y: Column, controls: Table, *, draws: int = 999, seed: int = 0
) -> tuple[float, float]:
    """Correlation of what is left of x and y, values over R runs, after a linear fit on the controls, and its p.

    The controls are (R, C); none give the plain correlation. The two-sided p is from permutations of the residuals of y
    (Freedman and Lane 1983). Both are NaN where fewer than C + 4 runs leave nothing to test, or nothing is left of x or
    y.
    """
    runs, count = len(x), controls.shape[1]
    if runs < count + 4:
        return math.nan, math.nan
    design = np.column_stack([np.ones(runs), controls])
    hat = design @ np.linalg.pinv(design)
    left_x, left_y = x - hat @ x, y - hat @ y
    # What a fit leaves of something that it explains is rounding.
    if any(np.linalg.norm(left) <= 1e-9 * np.linalg.norm(whole) for left, whole in ((left_x, x), (left_y, y))):
        return math.nan, math.nan
    value = _correlation(left_x, left_y)
    rng = np.random.Generator(np.random.Philox(key=seed))
    shuffled = np.stack([rng.permutation(left_y) for _ in range(draws)])
    drawn = [_correlation(left_x, again - hat @ again) for again in shuffled]
    reached = sum(abs(other) >= abs(value) - 1e-12 for other in drawn)
    return value, (1 + reached) / (1 + draws)


def _correlation(x: Column, y: Column) -> float:
    if len(x) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / scale if scale > 0 else math.nan


@dataclass(frozen=True)
class SignTest:
    """A one-sided exact sign test: p is the chance of as many positive medians, among those that are not zero."""

    positive: int
    units: int
    p: float


def sign_test(leads: Sequence[Number | None], clusters: Clusters | None = None) -> SignTest:
    """Test whether leads are positive more often than not, over independent units.

    Args:
        leads: Of each run, from `onset.lead`: -inf where a warning never came; None (nothing to warn of) is left out.
        clusters: Unit of each run; its lead is the median of its runs. Every run is a unit for None.

    Raises:
        UserError: There is not one unit for each run.
    """
    by_unit: dict[Hashable, list[Number]] = {}
    for name, value in zip(_units(clusters, len(leads)), leads, strict=True):
        if value is not None:
            by_unit.setdefault(name, []).append(value)
    medians = [statistics.median(values) for values in by_unit.values()]
    positive, units = sum(m > 0 for m in medians), sum(m != 0 for m in medians)
    p = float(stats.binomtest(positive, units, alternative="greater").pvalue) if units else 1.0
    return SignTest(positive, units, p)
