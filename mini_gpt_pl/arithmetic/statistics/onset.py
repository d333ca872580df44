r"""When something begins: onset rules and leads, as functions of recorded series.

Every rule is a function of (steps, values) that returns an optimizer step or None for never. Values that are NaN were
not resolved (a commutator defect below rounding): they are left out before a rule counts records, so they are neither a
crossing nor a zero. The rules are those of the original studies, by name, so that a claim can be re-read under each.

A rule that fires is no evidence yet: a run that never generalises may fire it as well (`discrimination.auc`), and so
may anything else that changes early in training (`discrimination.compare_clocks`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

# Counts are as good as measured values.
Number = int | float
Rule = Callable[[Sequence[int], Sequence[Number]], int | None]


def tenfold(
    steps: Sequence[int], defects: Sequence[Number], *, factor: float = 10.0, above: float = 20.0
) -> int | None:
    """First record, from the third on, above both ten times the baseline and 20 (arXiv 2602.16746).

    The baseline is the median of the first three records, but 0.1 at least. A single record suffices. The absolute
    level is not scale-free: with defects of float64, ten baselines are reached right after memorisation, and the 20 is
    what places the onset.
    """
    kept, values = _resolved(steps, defects)
    if len(values) < 3:
        return None
    bar = max(factor * max(statistics.median(values[:3]), 0.1), above)
    return next((step for step, value in zip(kept[2:], values[2:], strict=True) if value > bar), None)


def tenfold_slow(steps: Sequence[int], defects: Sequence[Number]) -> int | None:
    """`tenfold` with the absolute level 5 that the slow regime (lr 5e-5, wd 0.1) was given."""
    return tenfold(steps, defects, above=5.0)


def threefold(steps: Sequence[int], defects: Sequence[Number]) -> int | None:
    """First of three records in a row above three times the median of the first 30 % of the run (arXiv 2602.18523).

    The baseline depends on how long the run was recorded, so the rule cannot be applied while training, and a run that
    is cut elsewhere has another onset. The median of an even number of records is the mean of the middle two.
    """
    kept, values = _resolved(steps, defects)
    if not values:
        return None
    bar = 3.0 * statistics.median(values[: max(1, int(0.3 * len(values)))])
    return _first_run(kept, values, lambda value: value > bar, 3)


def three_sigma(steps: Sequence[int], defects: Sequence[Number]) -> int | None:
    """First of two records in a row above mean + 3 sd of the first ten (arXiv 2602.23696), looked for after them.

    The standard deviation divides by ten. None with fewer than twelve records.
    """
    kept, values = _resolved(steps, defects)
    if len(values) < 12:
        return None
    bar = statistics.fmean(values[:10]) + 3.0 * statistics.pstdev(values[:10])
    return _first_run(kept[10:], values[10:], lambda value: value > bar, 2)


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


def _resolved(steps: Sequence[int], values: Sequence[Number]) -> tuple[list[int], list[Number]]:
    """Leave out records whose value is NaN."""
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def _first_run(
    steps: Sequence[int], values: Sequence[Number], hit: Callable[[Number], bool], consecutive: int
) -> int | None:
    """First step of the first `consecutive` records in a row that hit."""
    for hits, records in groupby(zip(steps, values, strict=True), key=lambda record: hit(record[1])):
        run = [step for step, _ in records]
        if hits and len(run) >= consecutive:
            return run[0]
    return None
