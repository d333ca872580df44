"""Does an onset warn of generalisation? Onset rules beside placebo clocks, over runs that generalise and others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry import onset
from mini_gpt_pl.geometry.discrimination import Discrimination, SignTest, auc, compare_clocks, sign_test
from mini_gpt_pl.report.grokking_runs import LOSS, GrokkingRun
from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word

Steps = list[int | None]
ONSET = "D, 10 × and 20"
"""The paper's rule."""
PLACEBO = "train 99 %"
_tenfold = partial(onset.tenfold, above=0.0)


def clock_steps(run: GrokkingRun) -> dict[str, int | None]:
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
    found = {clock: _struck(run.commutator(name), rule) for clock, (name, rule) in rules.items()}
    found[PLACEBO] = run.steps["train_99"]
    found["‖θ‖ halved"] = _struck(run.series("eval/weight_norm"), _fallen_to(0.5))
    found["training loss, a tenth"] = _struck(run.series(LOSS), _fallen_to(0.1))
    return found


def _fallen_to(share: float) -> onset.Rule:
    def rule(steps: Sequence[int], values: Sequence[onset.Number]) -> int | None:
        return onset.first_below(steps, values, share * values[0]) if values else None

    return rule


def _struck(series: pd.Series[float], rule: Callable[[Sequence[int], Sequence[float]], int | None]) -> int | None:
    return rule([int(step) for step in series.index], series.tolist())


def leads(onsets: Sequence[int | None], generalised: Sequence[int | None]) -> list[float]:
    """Steps from onset to generalisation of the runs that generalise; -inf where the onset never came."""
    pairs = zip(onsets, generalised, strict=True)
    return [value for early, late in pairs if (value := onset.lead(early, late)) is not None]


def sign(runs: Sequence[GrokkingRun]) -> str | None:
    """The sign test of the leads with operations as units, in a sentence; None without a run that generalises."""
    found = sign_of(runs)
    if found is None:
        return None
    test, ahead, count = found
    return (
        f"Leads are positive in {ahead} of {count} runs. Seeds of one operation share its threshold and are one unit: "
        f"{test.positive} of {test.units} units, p = {test.p:.2g} (not 2^-{count})."
    )


def sign_of(runs: Sequence[GrokkingRun]) -> tuple[SignTest, int, int] | None:
    """Sign test over operations, runs with a positive lead, and all that generalise; None if there are none."""
    chosen = [run for run in runs if run.groks and run.name]
    if not chosen:
        return None
    found = leads([clock_steps(run)[ONSET] for run in chosen], [run.steps["t90"] for run in chosen])
    return sign_test(found, [run.unit for run in chosen]), sum(value > 0 for value in found), len(found)


def separation(runs: Sequence[GrokkingRun], clock: str) -> Discrimination | None:
    """How well a clock tells runs that generalise from those that do not; None where there are not both.

    Units are operations with or without decay; where seeds of one did and did not generalise, single runs.
    """
    sides = [[run for run in runs if run.groks is kind and run.name] for kind in (True, False)]
    if not all(sides):
        return None
    times = [[clock_steps(run)[clock] for run in side] for side in sides]
    units = ([run.unit for run in sides[0]], [run.unit for run in sides[1]])
    try:
        return auc(times[0], times[1], units)
    except UserError:
        return auc(times[0], times[1])


def discrimination(runs: Sequence[GrokkingRun]) -> Table:
    """Every clock: where it strikes, whether it tells the two kinds apart, and whether it knows when."""
    measured = [run for run in runs if run.name]
    chosen = [run for run in measured if run.groks]
    if not measured:
        return tabulate("grokking_discrimination", "", [])
    struck = {name: [clock_steps(run)[name] for run in chosen] for name in clock_steps(measured[0])}
    clocks = compare_clocks(struck, [run.steps["t90"] for run in chosen], given=(PLACEBO,)) if chosen else {}
    rows: list[Row] = []
    for name in clock_steps(measured[0]):
        split = separation(runs, name)
        clock = clocks.get(name)
        others = [clock_steps(run)[name] for run in measured if not run.groks]
        rows.append(
            {
                "clock": word(name),
                "runs that generalise": word(_range(struck[name])),
                "others": word(_range(others)),
                "AUC": number(None if split is None else split.auc, "{:.2f}"),
                "p": number(None if split is None else split.p, "{:.2g}"),
                "smallest p": number(None if split is None else split.smallest, "{:.2g}"),
                "leads": word("-" if clock is None else f"{clock.ahead} of {len(chosen)}"),
                "median lead": number(_finite(None if clock is None else clock.lead), "{:,.0f}"),
                "r with t90": number(None if clock is None else clock.correlation, "{:+.2f}"),
                "r, train 99 % given": number(None if clock is None or name == PLACEBO else clock.partial, "{:+.2f}"),
                "p of r": number(None if clock is None or name == PLACEBO else clock.p, "{:.2g}"),
            }
        )
    notes = [
        "First and last step at which a clock strikes, and in how many runs. 10 ×: above ten times the median of the "
        "first three records; the last three clocks are placebos, which only happen early.",
        "AUC: chance that a run that generalises has its onset before one that does not; 0.5 says nothing, and a clock "
        "that warns is above it. p under exchange of whole units (operations); with so few units it cannot be below "
        "the next column.",
        "A clock with a large lead need not know more: r is its correlation over runs with the step of generalisation, "
        "with and without the placebo's part; a clock that strikes at one step in all runs has none.",
    ]
    return tabulate("grokking_discrimination", "Does an onset tell which runs generalise, and when?", rows, notes)


def _range(steps: Sequence[int | None]) -> str:
    known = [step for step in steps if step is not None]
    if not steps:
        return "-"
    if not known:
        return f"never ({len(steps)} runs)"
    return f"{min(known):,} to {max(known):,} ({len(known)} of {len(steps)})"


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
