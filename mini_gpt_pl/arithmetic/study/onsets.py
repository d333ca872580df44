"""Does an onset of the defect warn of generalisation? Onsets, leads and rates, beside placebo clocks and other runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from mini_gpt_pl.arithmetic.statistics import onset
from mini_gpt_pl.arithmetic.statistics.discrimination import Discrimination, SignTest, auc, compare_clocks, sign_test
from mini_gpt_pl.arithmetic.statistics.scaling import scaling
from mini_gpt_pl.arithmetic.study.runs import (
    LOSS,
    PUBLISHED,
    SETTING,
    ResidueRun,
    lay_runs,
    run_values,
    spread,
    step_of,
)
from mini_gpt_pl.arithmetic.study.words import Value, Values, words
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Table

ONSET = "D, 10 × and 20"
"""The paper's rule."""
PLACEBO, NORM = "train 99 %", "‖θ‖ halved"
CONTROLS = (PLACEBO, NORM)
"""Plain clocks whose part is taken out of the others' correlations with the step of generalisation."""


def clock_steps(run: ResidueRun) -> dict[str, int | None]:
    """When each clock struck in a run: one rule on every series of a commutator, and things that merely change early.

    The rule, fixed beforehand, is the paper's: above ten times the median of the first three records. Weights and
    training loss fall, so theirs is a half and a tenth of the first value.
    """
    tenfold = {name: onset.tenfold(run.commutator(name), above=0.0) for name in ("defect", "c", "c_theta2", "norm_a")}

    def fallen_to(share: float, series: pd.Series[float]) -> int | None:
        steps = series.index[series < share * series.iloc[0]] if len(series) else series.index
        return int(steps[0]) if len(steps) else None

    return {
        ONSET: onset.tenfold(run.commutator("defect")),
        "D, 10 ×": tenfold["defect"],
        "c, 10 ×": tenfold["c"],
        "c‖θ‖², 10 ×": tenfold["c_theta2"],
        "‖g‖, 10 ×": tenfold["norm_a"],
        PLACEBO: run.steps["train_99"],
        NORM: fallen_to(0.5, run.series("eval/weight_norm")),
        "training loss, a tenth": fallen_to(0.1, run.series(LOSS)),
    }


def leads(runs: Sequence[ResidueRun]) -> list[float]:
    """Steps from onset to generalisation of the runs that generalise; -inf where the onset never came."""
    pairs = [onset.lead(clock_steps(run)[ONSET], run.steps["test_90"]) for run in runs]
    return [value for value in pairs if value is not None]


# ----------------------------------------------------------------------------------------------- kinds of runs

DO_NOT = "operations that do not"
OTHERS: Mapping[str, Callable[[ResidueRun], bool]] = {
    DO_NOT: lambda run: bool(run.decay),
    "no decay": lambda run: run.is_free,
}
"""Kinds of runs that do not generalise. Without decay nothing shrinks, so these say other things than operations."""


def sides(runs: Sequence[ResidueRun], others: str = DO_NOT) -> tuple[list[ResidueRun], list[ResidueRun]]:
    """Runs with a commutator that generalise under decay, and those of one kind of `OTHERS`.

    Runs whose norm is tied to another run's are that run over again, and in neither.
    """
    measured = [run for run in runs if run.reported and not run.is_tied]
    chosen = [run for run in measured if run.groks and run.decay]
    return chosen, [run for run in measured if not run.groks and OTHERS[others](run)]


def rate_of(runs: Sequence[ResidueRun]) -> float | None:
    """Learning rate of most runs with a commutator that generalise, the paper's if it is one; None without any.

    Steps of several rates are not to be compared.
    """
    rates = [run.rate for run in sides(runs)[0]]
    return max(rates, key=lambda rate: (rate == SETTING["learning rate"], rates.count(rate)), default=None)


def sign_of(runs: Sequence[ResidueRun]) -> tuple[SignTest, int, int] | None:
    """Sign test of the leads over units, runs with a positive lead, and all that generalise; None if there are none."""
    if not (chosen := sides(runs)[0]):
        return None
    ahead_by = leads(chosen)
    return sign_test(ahead_by, [run.unit for run in chosen]), sum(value > 0 for value in ahead_by), len(ahead_by)


def separation(runs: Sequence[ResidueRun], clock: str, others: str = DO_NOT) -> Discrimination | None:
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


# ------------------------------------------------------------------------------------------------------- onsets


def onsets(runs: Sequence[ResidueRun]) -> Table:
    """Onset by the paper's rule, generalisation and lead of every run, beside the range of the paper's three seeds."""
    rows: list[Values] = []
    for run in runs:
        if not run.reported:
            continue
        of = run.published("onsets", {})
        pairs = zip(of.get("t90", ()), of.get("onset", ()), strict=False)
        row: dict[str, Value] = {**run_values(run, runs), "onset": step_of(clock_steps(run)[ONSET])}
        row |= {"onset, paper": spread(of.get("onset", ())), **run.reached("train_99", "test_90")}
        row |= {"t90, paper": spread(of.get("t90", ())), **run.reached("test_98_thrice")}
        row["stop, paper"] = spread(of.get("stop", ()))
        row["lead"] = next((lead for lead in leads([run]) if math.isfinite(lead)), None)
        row["lead, paper"] = spread([t90 - begun for t90, begun in pairs])
        row["lead of train 99 %"] = lead_of_memory(run)
        rows.append(row)
    signs = sign_of(runs)
    said = None
    if signs is not None:
        said = words("tables")["grokking_onsets"]["sign"].format(signs[0], ahead=signs[1], count=signs[2])
    return lay_runs("grokking_onsets", rows, runs, sign=said)


def lead_of_memory(run: ResidueRun) -> float | None:
    """Steps from 99 % of the training set to t90, the lead of the placebo."""
    first, last = run.steps["train_99"], run.steps["test_90"]
    return None if first is None or last is None else last - first


def rules(runs: Sequence[ResidueRun]) -> Table:
    """Onset of D by every rule of the studies, side by side, and the lead of each over the step of the stop."""
    rows: list[Values] = []
    columns = words("tables")["grokking_onset_rules"]["rules"]
    for run in runs:
        if (defects := run.commutator("defect")).empty:
            continue
        row = dict(run_values(run, runs))
        t90, stop = run.steps["test_90"], run.steps["test_98_thrice"]
        for name, rule in onset.RULES.items():
            begun = rule(defects)
            ahead = None if stop is None else onset.lead(begun, t90, stop)
            row[columns[name]] = step_of(begun)
            row[f"lead / stop, {columns[name]}"] = None if ahead is None or math.isinf(ahead) else ahead
        rows.append(row)
    return lay_runs("grokking_onset_rules", rows, runs)


# -------------------------------------------------------------------------------------------------------- rates


def rates(runs: Sequence[ResidueRun]) -> Table:
    """Onset, generalisation and largest defect by learning rate and operation; for runs of several rates.

    Published are means over the four operations that generalise, and ranges of the two that do not: they stand beside
    the rows of all such operations.
    """
    measured = [run for run in runs if run.decay and run.reported]
    every_rate = sorted({run.rate for run in measured})
    rows: list[Values] = []
    for rate in every_rate if len(every_rate) > 1 else []:
        here = [run for run in measured if run.rate == rate]
        for operation in dict.fromkeys(run.operation for run in here):
            chosen = [run for run in here if run.operation == operation]
            rows.append({"lr": plain(rate), "operation": operation, **_of_rate(chosen)})
        paper = {} if any(run.differs for run in here) else PUBLISHED["rates"].get(rate, {})
        for groks, said in ((True, "all that generalise"), (False, "all that do not generalise")):
            if chosen := [run for run in here if run.groks is groks]:
                row = {"lr": plain(rate), "operation": said, **_of_rate(chosen)}
                for column, name in words("tables")["grokking_rates"]["paper"].items():
                    value, form = (
                        paper.get(name if groks else f"others_{name}"),
                        "{:.3g}" if name == "largest" else "{:,.0f}",
                    )
                    row[f"{column}, paper"] = spread(value, form) if isinstance(value, list) else value
                rows.append(row)
    law = _power_law([run for run in measured if run.groks])
    return lay_runs("grokking_rates", rows, runs, law=law)


def _of_rate(runs: Sequence[ResidueRun]) -> Values:
    """Means over some runs of one rate, and the ranges of their onsets and largest defects."""
    t90, memorised = ([step for run in runs if (step := run.steps[name])] for name in ("test_90", "train_99"))
    begun = [step for run in runs if (step := clock_steps(run)[ONSET]) is not None]
    lead = [value for value in leads(runs) if math.isfinite(value)]
    return {
        "runs": len(runs),
        "t90": _mean(t90),
        "onset": _mean(begun),
        "onsets": spread(begun),
        "train 99 %": _mean(memorised),
        "lead": _mean(lead),
        "lead > 0": f"{sum(value > 0 for value in lead)} of {len(t90)}" if t90 else "-",
        "largest D": spread([float(run.commutator("defect").max()) for run in runs], "{:.3g}"),
    }


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _power_law(runs: Sequence[ResidueRun]) -> str:
    """Say what a log-log fit of lead against generalisation gives, or why there is none."""
    pairs = [(run, lead) for run in runs for lead in leads([run])]
    ahead = [(run, lead) for run, lead in pairs if lead > 0]
    try:
        t90 = [run.steps["test_90"] or 0 for run, _ in ahead]
        fit = scaling(t90, [lead for _, lead in ahead], [run.rate for run, _ in ahead])
    except UserError as error:
        return f"No power law: {error}."
    within = [f"{plain(rate)}: {'-' if value is None else f'{value:.2f}'}" for rate, value in fit.within.items()]
    said: str = words("tables")["grokking_rates"]["law"]
    return said.format(
        exponent=fit.whole.exponent, count=len(within), within=", ".join(within), behind=len(pairs) - len(ahead)
    )


# ------------------------------------------------------------------------------------------------------- clocks


def discrimination(runs: Sequence[ResidueRun]) -> Table:
    """Every clock, rate by rate: where it strikes, whether it tells the kinds apart, and whether it knows when."""
    rates = sorted({run.rate for run in runs if run.reported and not run.is_tied})
    rows = [row for rate in rates for row in _clocks([run for run in runs if run.rate == rate], rate)]
    both = sorted(set.intersection(*({run.unit for run in side} for side in sides(runs))))
    said = words("tables")["grokking_discrimination"]["mixed"].format("; ".join(both)) if both else None
    return lay_runs("grokking_discrimination", rows, runs, mixed=said)


def _clocks(runs: Sequence[ResidueRun], rate: float) -> list[Values]:
    """Rows of the runs of one learning rate: steps of several rates are not to be compared."""
    kinds = {others: sides(runs, others)[1] for others in OTHERS}
    chosen = sides(runs)[0]
    if not (compared := [*chosen, *(run for side in kinds.values() for run in side)]):
        return []
    struck = {name: [clock_steps(run)[name] for run in chosen] for name in clock_steps(compared[0])}
    clocks = compare_clocks(struck, [run.steps["test_90"] for run in chosen], controls=CONTROLS) if chosen else {}
    rows: list[Values] = []
    for name, of_chosen in struck.items():
        row: dict[str, Value] = {"lr": plain(rate), "clock": name, "runs that generalise": _range(of_chosen)}
        for others, side in kinds.items():
            split = separation(runs, name, others)
            row[others] = _range([clock_steps(run)[name] for run in side])
            row[f"AUC, {others}"] = None if split is None else split.auc
            row[f"p, {others}"] = None if split is None else split.p
            row[f"smallest p, {others}"] = None if split is None else split.smallest
        if clock := clocks.get(name):
            row["leads"] = f"{clock.ahead} of {len(chosen)}"
            row["median lead"] = clock.lead if math.isfinite(clock.lead) else None
            row["r with t90"] = clock.correlation
            # None for those that are taken out of the others'.
            row[f"r, {' and '.join(CONTROLS)} given"] = None if name in CONTROLS else clock.partial
            row["p of r"] = None if name in CONTROLS else clock.p
        rows.append(row)
    return rows


def _range(steps: Sequence[int | None]) -> str:
    struck = [step for step in steps if step is not None]
    if not steps:
        return "-"
    if not struck:
        return f"never ({len(steps)} runs)"
    return f"{min(struck):,} to {max(struck):,} ({len(struck)} of {len(steps)})"
