"""Run by run around generalisation: how far PC1 lies from its null, and how far the commutator falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mini_gpt_pl.arithmetic.study.groups import commutator_note, run_cells
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, median, reached
from mini_gpt_pl.arithmetic.study.tables import short
from mini_gpt_pl.report.sheet import Cell, Row, Table, gap, number, tabulate

NEAR, FAR = 0.06, 3.0
"""A PC1 this close to its null is near it; a c that falls by more than this factor has fallen."""
_BEHIND = 300  # steps behind t90
_SHARE = "{:.1%}"
_NULL_NOTE = (
    "Decay, ‖e‖: the walk under the run's weight decay with the lengths of the measured innovations "
    "e = θ_k - ρ_k θ_(k-1), in orthogonal directions."
)


@dataclass(frozen=True)
class Excess:
    """Centred PC1 from the start to the stop, less that of the walk that decays with innovations as long.

    Args:
        whole: Of all recorded weights.
        furthest: Of the group that lies furthest from its null.
        group: That group.
    """

    whole: float
    furthest: float
    group: str


@dataclass(frozen=True)
class Fall:
    """What c does when a run reaches 90 % of the test set.

    Args:
        level: Median of the last three records before.
        floor: Least record from there to 300 steps later.
        single: The record there over that 300 steps later; NaN where either was not taken.
    """

    level: float
    floor: float
    single: float

    @property
    def factor(self) -> float:
        """Level over floor."""
        return _ratio(self.level, self.floor)


def excess_at_stop(run: ResidueRun) -> Excess | None:
    """Find how far PC1 lies from its null; None without a stop or with too short a path."""
    numbers = run.numbers(run.cut) if run.steps["test_98_thrice"] is not None else {}
    over = {
        label: of["pc1_centred"]["measured"] - of["pc1_centred"]["innovation_walk"] for label, of in numbers.items()
    }
    whole = over.pop(run.trunk, math.nan)
    if not over:
        return None
    group = max(over, key=lambda label: abs(over[label]))
    return Excess(whole, over[group], group)


def fall_of_c(run: ResidueRun) -> Fall | None:
    """Find how far c falls; None without t90 or with fewer than three records before it or none behind it."""
    c, t90 = run.commutator("c").dropna(), run.steps["test_90"]
    if t90 is None:
        return None
    before, behind = c[c.index < t90].iloc[-3:], c[(c.index >= t90) & (c.index <= t90 + _BEHIND)]
    if len(before) < 3 or behind.empty:
        return None
    single = _ratio(*(float(c.get(step, math.nan)) for step in (t90, t90 + _BEHIND)))
    return Fall(median(before.tolist()), float(behind.min()), single)


def _ratio(before: float, behind: float) -> float:
    """How many times smaller: without a limit where nothing is left, and NaN where there was nothing before either."""
    if behind == 0:
        return math.inf if before > 0 else math.nan
    return before / behind


def seed_by_seed(runs: Sequence[ResidueRun]) -> Table:
    """Each run that generalises: PC1 over its null at the stop, and c before and behind t90."""
    rows: list[Row] = []
    judged = [(run, excess_at_stop(run), fall_of_c(run)) for run in runs]
    judged = [(run, excess, fall) for run, excess, fall in judged if excess is not None or fall is not None]
    for run, excess, fall in judged:
        cells = {**run_cells(run, runs), "t90": reached(run, "test_90"), "stop": reached(run, "test_98_thrice")}
        if excess is not None:
            cells["all, over ‖e‖"] = gap(excess.whole, _SHARE)
            shown = gap(excess.furthest, _SHARE)
            cells["furthest matrix, over ‖e‖"] = Cell(f"{short(excess.group)} {shown.text}", excess.furthest)
        if fall is not None:
            cells["c before t90"] = number(fall.level, "{:.3g}")
            cells["least c behind it"] = number(fall.floor, "{:.3g}")
            cells["falls by"] = number(fall.factor, "{:.1f}")
            cells["as single records"] = number(fall.single, "{:.1f}")
        rows.append(cells)
    near, fallen = [e for _, e, _ in judged if e is not None], [fall for _, _, fall in judged if fall is not None]
    notes = [
        _near(near) if near else None,
        _fallen(fallen) if fallen else None,
        _NULL_NOTE if rows else None,
        commutator_note(runs),
    ]
    return tabulate("grokking_seeds", "Run by run: PC1 over its null, and the fall of c", rows, notes)


def _near(excesses: Sequence[Excess]) -> str:
    return (
        f"PC1 from the start to the stop, less that of the walk of decay, ‖e‖: within {100 * NEAR:.0f} points for all "
        f"recorded weights together in {_share([abs(e.whole) < NEAR for e in excesses])}, for each matrix by itself "
        f"in {_share([abs(e.furthest) < NEAR for e in excesses])}."
    )


def _fallen(falls: Sequence[Fall]) -> str:
    return (
        f"c falls by more than {FAR:.0f} from the median of the last three records before t90 to the least of the "
        f"{_BEHIND} steps from there on in {_share([one.factor > FAR for one in falls])}; from the single record at "
        f"t90 to that {_BEHIND} steps later in {_share([one.single > FAR for one in falls])}."
    )


def _share(holds: Sequence[bool]) -> str:
    return f"{sum(holds)} of {len(holds)} runs"
