"""Tables over runs of the second task: onset of the defect, generalisation and lead, beside the published ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mini_gpt_pl.arithmetic.statistics import onset as onset_rules
from mini_gpt_pl.arithmetic.statistics.scaling import scaling
from mini_gpt_pl.arithmetic.study.clocks import ONSET, clock_steps, leads, sign
from mini_gpt_pl.arithmetic.study.groups import commutator_note, published_onsets, run_cells, setting_note, spread
from mini_gpt_pl.arithmetic.study.published import NOTES, RATES
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, reached
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word

_STEP = "{:,.0f}"


def onsets(runs: Sequence[ResidueRun]) -> Table:
    """Onset by the paper's rule, generalisation and lead of every run, beside the range of the paper's three seeds."""
    rows: list[Row] = []
    for run in runs:
        if not run.reported:
            continue
        onset = clock_steps(run)[ONSET]
        published = published_onsets(run)
        pairs = zip(published.get("t90", ()), published.get("onset", ()), strict=False)
        lead = leads([onset], [run.steps["test_90"]])
        rows.append(
            {
                **run_cells(run, runs),
                "onset": _step(onset),
                "onset, paper": spread(published.get("onset", ()), _STEP),
                "train 99 %": reached(run, "train_99"),
                "t90": reached(run, "test_90"),
                "t90, paper": spread(published.get("t90", ()), _STEP),
                "stop": reached(run, "test_98_thrice"),
                "stop, paper": spread(published.get("stop", ()), _STEP),
                "lead": number(lead[0] if lead and math.isfinite(lead[0]) else None, _STEP),
                "lead, paper": spread([t90 - begun for t90, begun in pairs], _STEP),
                "lead of train 99 %": number(_lead_of(run, "train_99"), _STEP),
            }
        )
    notes = [
        "Onset: first defect, from the third record on, above ten times the median of the first three and above 20. "
        "Lead: t90 - onset. Whatever happens early leads: the last column has the lead of the step at which the "
        "training set was learned.",
        NOTES["onset"],
        sign(runs),
        commutator_note(runs),
        setting_note(runs),
    ]
    return tabulate("grokking_onsets", "Onset of the defect and generalisation", rows, notes)


def _step(step: int | None) -> Cell:
    return word("never") if step is None else number(step, _STEP)


def _lead_of(run: ResidueRun, name: str) -> float | None:
    step, t90 = run.steps[name], run.steps["test_90"]
    return None if step is None or t90 is None else t90 - step


_RULES = {
    "tenfold": "10 × and 20",
    "tenfold_slow": "10 × and 5",
    "threefold": "3 × the first 30 %",
    "three_sigma": "mean + 3 sd",
}


def rules(runs: Sequence[ResidueRun]) -> Table:
    """Onset of D by every rule of the studies, side by side, and the lead of each over the step of the stop."""
    rows: list[Row] = []
    for run in runs:
        defects = run.commutator("defect")
        if defects.empty:
            continue
        cells = run_cells(run, runs)
        steps, t90, stop = [int(step) for step in defects.index], run.steps["test_90"], run.steps["test_98_thrice"]
        for name, rule in onset_rules.RULES.items():
            begun = rule(steps, defects.tolist())
            ahead = None if stop is None else onset_rules.lead(begun, t90, stop)
            cells[_RULES[name]] = _step(begun)
            share = None if ahead is None or math.isinf(ahead) else ahead
            cells[f"lead / stop, {_RULES[name]}"] = number(share, "{:+.2f}")
        rows.append(cells)
    notes = [
        "10 ×: median of the first three records. 3 ×: median of the first 30 % of the run, three records in a row, "
        "which cannot be known while training. Mean + 3 sd: of the first ten records, two in a row. Lead / stop: "
        "(t90 - onset) over the third evaluation in a row with 98 %. A rule that fires where nothing generalises is no "
        "warning.",
        commutator_note(runs),
    ]
    return tabulate("grokking_onset_rules", "Onset of the defect by every rule", rows, notes)


def rates(runs: Sequence[ResidueRun]) -> Table:
    """Onset, generalisation and largest defect by learning rate and operation; for runs of several rates.

    Published are means over the four operations that generalise, and ranges of the two that do not: they stand beside
    the rows of all such operations.
    """
    measured = [run for run in runs if run.decay and run.reported]
    every_rate = sorted({run.rate for run in measured})
    rows: list[Row] = []
    for rate in every_rate if len(every_rate) > 1 else []:
        here = [run for run in measured if run.rate == rate]
        for operation in dict.fromkeys(run.operation for run in here):
            chosen = [run for run in here if run.operation == operation]
            rows.append({"lr": word(plain(rate)), "operation": word(operation), **_rate_cells(chosen)})
        paper = RATES.get(rate) if not any(run.differs for run in here) else None
        for groks in (True, False):
            if chosen := [run for run in here if run.groks is groks]:
                head = {"lr": word(plain(rate)), "operation": word(f"all that {'' if groks else 'do not '}generalise")}
                rows.append(
                    {**head, **_rate_cells(chosen), **({} if paper is None else _published(paper, groks=groks))}
                )
    chosen = [run for run in measured if run.groks]
    notes = [_power_law(chosen), NOTES["rates"], commutator_note(runs)]
    return tabulate("grokking_rates", "Onset and generalisation by learning rate", rows, notes)


def _rate_cells(runs: Sequence[ResidueRun]) -> dict[str, Cell]:
    """Means over some runs of one rate, and the ranges of their onsets and largest defects."""
    struck = [clock_steps(run)[ONSET] for run in runs]
    t90 = [run.steps["test_90"] for run in runs]
    generalised = [step for step in t90 if step is not None]
    lead = [value for value in leads(struck, t90) if math.isfinite(value)]
    begun = [step for step in struck if step is not None]
    memorised = [step for run in runs if (step := run.steps["train_99"]) is not None]
    return {
        "runs": number(len(runs), "{:.0f}"),
        "t90": _mean(generalised),
        "onset": _mean(begun),
        "onsets": spread(begun, _STEP),
        "train 99 %": _mean(memorised),
        "lead": _mean(lead),
        "lead > 0": word(f"{sum(value > 0 for value in lead)} of {len(generalised)}" if generalised else "-"),
        "largest D": spread([float(run.commutator("defect").max()) for run in runs], "{:.3g}"),
    }


def _mean(values: Sequence[float]) -> Cell:
    return number(statistics.fmean(values) if values else None, _STEP)


def _published(paper: Mapping[str, Any], *, groks: bool) -> dict[str, Cell]:
    if not groks:
        return {
            "onsets, paper": spread(paper.get("others_onsets", ()), _STEP),
            "largest D, paper": spread(paper.get("others_largest", ()), "{:.3g}"),
        }
    return {
        "t90, paper": number(paper["t90"], _STEP),
        "onset, paper": number(paper["onset"], _STEP),
        "onsets, paper": spread(paper.get("onsets", ()), _STEP),
        "train 99 %, paper": number(paper["train_99"], _STEP),
        "lead, paper": number(paper["lead"], _STEP),
        "lead > 0, paper": word(f"{paper['ahead']} of {paper['runs']}"),
        "largest D, paper": spread(paper.get("largest", ()), "{:.3g}"),
    }


def _power_law(runs: Sequence[ResidueRun]) -> str:
    """Say what a log-log fit of lead against generalisation gives, or why there is none."""
    pairs = [(run, lead) for run in runs for lead in leads([clock_steps(run)[ONSET]], [run.steps["test_90"]])]
    ahead = [(run, lead) for run, lead in pairs if lead > 0]
    try:
        fit = scaling(
            [run.steps["test_90"] or 0 for run, _ in ahead], [lead for _, lead in ahead], [r.rate for r, _ in ahead]
        )
    except UserError as error:
        return f"No power law: {error}."
    within = [f"{plain(rate)}: {_exponent(value)}" for rate, value in fit.within.items()]
    behind = len(pairs) - len(ahead)
    return (
        f"Lead against t90 has the exponent {fit.whole.exponent:.2f} over {len(within)} rates, within each "
        f"{', '.join(within)}; {behind} runs without a positive lead are not in it, which chooses the answer. Where "
        "the onset is a constant c, the slope is T / (T - c) > 1 whatever the dynamics."
    )


def _exponent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
