"""Does an onset warn of generalisation? Onset rules beside placebo clocks, over runs that generalise and others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd

from mini_gpt_pl.arithmetic.statistics import onset
from mini_gpt_pl.arithmetic.statistics.discrimination import (
    Clock,
    Discrimination,
    SignTest,
    auc,
    compare_clocks,
    sign_test,
)
from mini_gpt_pl.arithmetic.study.groups import commutator_note
from mini_gpt_pl.arithmetic.study.published import SETTING
from mini_gpt_pl.arithmetic.study.runs import LOSS, ResidueRun
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word

Steps = list[int | None]
ONSET = "D, 10 × and 20"
"""The paper's rule."""
PLACEBO, NORM = "train 99 %", "‖θ‖ halved"
GIVEN = (PLACEBO, NORM)
"""Plain clocks whose part is taken out of the others' correlations with the step of generalisation."""
_tenfold = partial(onset.tenfold, above=0.0)


def clock_steps(run: ResidueRun) -> dict[str, int | None]:
    """When each clock struck in a run: one rule on every series of a commutator, and things that merely change early.

    The rule, fixed beforehand, is the paper's: above ten times the median of the first three records. Weights and
    training loss fall, so theirs is a half and a tenth of the first value.
    """
    rules: Mapping[str, tuple[str, onset.Rule]] = {
        ONSET: ("defect", onset.tenfold),
        "D, 10 ×": ("defect", _tenfold),
        "c, 10 ×": ("c", _tenfold),
        "c‖θ‖², 10 ×": ("c_theta2", _tenfold),
        "‖g‖, 10 ×": ("norm_a", _tenfold),
    }
    struck = {clock: _struck(run.commutator(name), rule) for clock, (name, rule) in rules.items()}
    struck[PLACEBO] = run.steps["train_99"]
    struck[NORM] = _struck(run.series("eval/weight_norm"), _fallen_to(0.5))
    struck["training loss, a tenth"] = _struck(run.series(LOSS), _fallen_to(0.1))
    return struck


def _fallen_to(share: float) -> onset.Rule:
    def rule(steps: Sequence[int], values: Sequence[onset.Number]) -> int | None:
        fallen = (step for step, value in zip(steps, values, strict=True) if value < share * values[0])
        return next(fallen, None)

    return rule


def _struck(series: pd.Series[float], rule: Callable[[Sequence[int], Sequence[float]], int | None]) -> int | None:
    return rule([int(step) for step in series.index], series.tolist())


def leads(onsets: Sequence[int | None], generalised: Sequence[int | None]) -> list[float]:
    """Steps from onset to generalisation of the runs that generalise; -inf where the onset never came."""
    pairs = zip(onsets, generalised, strict=True)
    return [value for early, late in pairs if (value := onset.lead(early, late)) is not None]


def sign(runs: Sequence[ResidueRun]) -> str | None:
    """The sign test of the leads over units, in a sentence; None without a run that generalises."""
    signs = sign_of(runs)
    if signs is None:
        return None
    test, ahead, count = signs
    return (
        f"Leads are positive in {ahead} of {count} runs. Seeds of one operation, decay and learning rate "
        f"share a threshold and are one unit: {test.positive} of {test.units} units, p = {test.p:.2g} (not 2^-{count})."
    )


def sign_of(runs: Sequence[ResidueRun]) -> tuple[SignTest, int, int] | None:
    """Sign test over units, runs with a positive lead, and all that generalise; None if there are none."""
    chosen = sides(runs, DO_NOT)[0]
    if not chosen:
        return None
    ahead_by = leads([clock_steps(run)[ONSET] for run in chosen], [run.steps["test_90"] for run in chosen])
    return sign_test(ahead_by, [run.unit for run in chosen]), sum(value > 0 for value in ahead_by), len(ahead_by)


DO_NOT = "operations that do not"
OTHERS: Mapping[str, Callable[[ResidueRun], bool]] = {
    DO_NOT: lambda run: bool(run.decay),
    "no decay": lambda run: run.is_free,
}
"""Kinds of runs that do not generalise. Without decay nothing shrinks, so these say other things than operations."""


def rate_of(runs: Sequence[ResidueRun]) -> float | None:
    """Learning rate of most runs with a commutator that generalise, the paper's if it is one; None without any.

    Steps of several rates are not to be compared.
    """
    rates = [run.rate for run in sides(runs, DO_NOT)[0]]
    return max(rates, key=lambda rate: (rate == SETTING["learning rate"], rates.count(rate)), default=None)


def sides(runs: Sequence[ResidueRun], others: str) -> tuple[list[ResidueRun], list[ResidueRun]]:
    """Runs with a commutator that generalise under decay, and those of one kind of `OTHERS`.

    Runs whose norm is tied to another run's are that run over again, and in neither.
    """
    measured = [run for run in runs if run.reported and not run.is_tied]
    chosen = [run for run in measured if run.groks and run.decay]
    return chosen, [run for run in measured if not run.groks and OTHERS[others](run)]


def separation(runs: Sequence[ResidueRun], clock: str, others: str = "operations that do not") -> Discrimination | None:
    """How well a clock tells runs that generalise from one kind of runs that do not; None where there are not both.

    Units are operation, decay and learning rate. Where seeds of one did and did not generalise, labels cannot be
    exchanged between whole units: there is an area, and no p (NaN).
    """
    pair = sides(runs, others)
    if not all(pair):
        return None
    times = [[clock_steps(run)[clock] for run in side] for side in pair]
    units = ([run.unit for run in pair[0]], [run.unit for run in pair[1]])
    if set(units[0]) & set(units[1]):
        return replace(auc(times[0], times[1]), p=math.nan, smallest=math.nan, units=len({*units[0], *units[1]}))
    return auc(times[0], times[1], units)


def mixed_note(runs: Sequence[ResidueRun]) -> str | None:
    """Name the units of which some seeds generalise and others do not; None if there are none."""
    chosen, others = sides(runs, DO_NOT)
    both = sorted({run.unit for run in chosen} & {run.unit for run in others})
    if not both:
        return None
    return (
        f"No p beside some AUC: of {'; '.join(both)} some seeds generalise and others do not, so labels cannot be "
        "exchanged between whole units."
    )


def discrimination(runs: Sequence[ResidueRun]) -> Table:
    """Every clock, rate by rate: where it strikes, whether it tells the kinds apart, and whether it knows when."""
    rates = sorted({run.rate for run in runs if run.reported and not run.is_tied})
    rows = [row for rate in rates for row in _of_rate([run for run in runs if run.rate == rate], rate)]
    notes = [
        "First and last step at which a clock strikes, and in how many runs. 10 ×: above ten times the median of the "
        "first three records; the last three clocks are placebos, which only happen early.",
        "AUC: chance that a run that generalises has its onset before an operation that does not, or before a run "
        "without decay; 0.5 says nothing, and a clock that warns is above it. p under exchange of whole units "
        "(operation, decay and learning rate); with so few units it cannot be below the next column.",
        "A clock with a large lead need not know more: r is its correlation over runs with the step of generalisation; "
        f"then with the parts of {' and '.join(GIVEN)} taken out, which takes six runs. A clock that strikes at one "
        "step in all runs has none.",
        mixed_note(runs),
        commutator_note(runs),
    ]
    return tabulate("grokking_discrimination", "Does an onset tell which runs generalise, and when?", rows, notes)


def _of_rate(runs: Sequence[ResidueRun], rate: float) -> list[Row]:
    """Rows of the runs of one learning rate: steps of several rates are not to be compared."""
    kinds = {others: sides(runs, others)[1] for others in OTHERS}
    chosen = sides(runs, DO_NOT)[0]
    compared = [*chosen, *(run for side in kinds.values() for run in side)]
    if not compared:
        return []
    struck = {name: [clock_steps(run)[name] for run in chosen] for name in clock_steps(compared[0])}
    clocks = compare_clocks(struck, [run.steps["test_90"] for run in chosen], given=GIVEN) if chosen else {}
    rows: list[Row] = []
    for name, of_chosen in struck.items():
        cells = {"lr": word(plain(rate)), "clock": word(name), "runs that generalise": word(_range(of_chosen))}
        for others, side in kinds.items():
            cells |= _apart(runs, name, others, [clock_steps(run)[name] for run in side])
        rows.append(cells | _when(clocks.get(name), len(chosen), control=name in GIVEN))
    return rows


def _apart(runs: Sequence[ResidueRun], clock: str, others: str, struck: Steps) -> dict[str, Cell]:
    split = separation(runs, clock, others)
    return {
        others: word(_range(struck)),
        f"AUC, {others}": number(None if split is None else split.auc, "{:.2f}"),
        f"p, {others}": number(None if split is None else split.p, "{:.2g}"),
        f"smallest p, {others}": number(None if split is None else split.smallest, "{:.2g}"),
    }


def _when(clock: Clock | None, count: int, *, control: bool) -> dict[str, Cell]:
    """Lead and correlations of a clock; none are given to those that are taken out of the others'."""
    if clock is None:
        return {}
    return {
        "leads": word(f"{clock.ahead} of {count}"),
        "median lead": number(_finite(clock.lead), "{:,.0f}"),
        "r with t90": number(clock.correlation, "{:+.2f}"),
        f"r, {' and '.join(GIVEN)} given": number(None if control else clock.partial, "{:+.2f}"),
        "p of r": number(None if control else clock.p, "{:.2g}"),
    }


def _range(steps: Sequence[int | None]) -> str:
    struck = [step for step in steps if step is not None]
    if not steps:
        return "-"
    if not struck:
        return f"never ({len(steps)} runs)"
    return f"{min(struck):,} to {max(struck):,} ({len(struck)} of {len(steps)})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
