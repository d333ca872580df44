r"""When something begins: onset rules and leads, as functions of recorded series.

Every rule is a function of a series by step that returns an optimizer step or None for never. Values that are NaN were
not resolved (a commutator defect below rounding): they are left out before a rule counts records, so they are neither a
crossing nor a zero. The rules are those of the original studies, by name, so that a claim can be re-read under each.

A rule that fires is no evidence yet: a run that never generalises may fire it as well (`discrimination.auc`), and so
may anything else that changes early in training (`discrimination.compare_clocks`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from itertools import groupby

import pandas as pd

# Counts are as good as measured values.
Number = int | float
Rule = Callable[["pd.Series[float]"], int | None]


def tenfold(defects: pd.Series[float], *, factor: float = 10.0, above: float = 20.0) -> int | None:
    """First record, from the third on, above both ten times the baseline and 20 (arXiv 2602.16746).

    The baseline is the median of the first three records, but 0.1 at least. A single record suffices. The absolute
    level is not scale-free: with defects of float64, ten baselines are reached right after memorisation, and the 20 is
    what places the onset.
    """
    records = defects.dropna()
    if len(records) < 3:
        return None
    bar = max(factor * max(statistics.median(records.iloc[:3]), 0.1), above)
    return _first_above(bar, records.iloc[2:], 1)


def tenfold_slow(defects: pd.Series[float]) -> int | None:
    """`tenfold` with the absolute level 5 that the slow regime (lr 5e-5, wd 0.1) was given."""
    return tenfold(defects, above=5.0)


def threefold(defects: pd.Series[float]) -> int | None:
    """First of three records in a row above three times the median of the first 30 % of the run (arXiv 2602.18523).

    The baseline depends on how long the run was recorded, so the rule cannot be applied while training, and a run that
    is cut elsewhere has another onset. The median of an even number of records is the mean of the middle two.
    """
    records = defects.dropna()
    if records.empty:
        return None
    bar = 3.0 * statistics.median(records.iloc[: max(1, int(0.3 * len(records)))])
    return _first_above(bar, records, 3)


def three_sigma(defects: pd.Series[float]) -> int | None:
    """First of two records in a row above mean + 3 sd of the first ten (arXiv 2602.23696), looked for after them.

    The standard deviation divides by ten. None with fewer than twelve records.
    """
    records = defects.dropna()
    if len(records) < 12:
        return None
    first = records.iloc[:10].tolist()
    return _first_above(statistics.fmean(first) + 3.0 * statistics.pstdev(first), records.iloc[10:], 2)


# Rules for a commutator defect. A report on several runs shows them side by side.
RULES: Mapping[str, Rule] = {
    "tenfold": tenfold,
    "tenfold_slow": tenfold_slow,
    "threefold": threefold,
    "three_sigma": three_sigma,
}


def lead(onset: Number | None, generalised: Number | None, horizon: Number | None = None) -> float | None:
    """Steps from an onset to generalisation, over a horizon such as the stop step: the normalised lead.

    Negative where the onset came after it, -inf where it never came (None), and None for a run that never generalised:
    there was nothing to warn of.
    """
    if generalised is None:
        return None
    if onset is None:
        return -math.inf
    return (generalised - onset) / (horizon or 1)


def _first_above(bar: Number, records: pd.Series[float], consecutive: int) -> int | None:
    """First step of the first `consecutive` records in a row that lie above a bar."""
    by_step = zip(records.index.tolist(), records.tolist(), strict=True)
    for above, row in groupby(by_step, key=lambda record: record[1] > bar):
        steps = [int(step) for step, _ in row]
        if above and len(steps) >= consecutive:
            return steps[0]
    return None
