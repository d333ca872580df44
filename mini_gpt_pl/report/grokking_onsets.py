"""Tables over runs of the second task: onset of the defect, generalisation and lead, beside the published ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.scaling import scaling
from mini_gpt_pl.report.grokking_clocks import ONSET, clock_steps, leads, sign
from mini_gpt_pl.report.grokking_groups import commutator_note, run_cells, setting_note
from mini_gpt_pl.report.grokking_published import ONSET_NOTE, ONSETS, RATES, Onsets, of_seed
from mini_gpt_pl.report.grokking_runs import GrokkingRun, reached
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word

_STEP = "{:,.0f}"


def onsets(runs: Sequence[GrokkingRun]) -> Table:
    """Onset by the paper's rule, generalisation and lead of every run, beside the paper's run of the same seed."""
    rows: list[Row] = []
    for run in runs:
        if not run.name:
            continue
        onset = clock_steps(run)[ONSET]
        paper = ONSETS.get(run.operation) if run.repeats and run.decay else None
        columns = () if paper is None else _by_column(paper)
        published = {column: of_seed(values, run.seed) for column, values in columns}
        lead = leads([onset], [run.steps["t90"]])
        rows.append(
            {
                **run_cells(run, runs),
                "onset": word("never") if onset is None else number(onset, _STEP),
                "onset, paper": number(published.get("onset"), _STEP),
                "train 99 %": reached(run, "train_99"),
                "t90": reached(run, "t90"),
                "t90, paper": number(published.get("t90"), _STEP),
                "stop": reached(run, "stop"),
                "stop, paper": number(published.get("stop"), _STEP),
                "lead": number(lead[0] if lead and math.isfinite(lead[0]) else None, _STEP),
                "lead, paper": number(published.get("lead"), _STEP),
                "lead of train 99 %": number(_lead_of(run, "train_99"), _STEP),
            }
        )
    notes = [
        "Onset: first defect, from the third record on, above ten times the median of the first three and above 20. "
        "Lead: t90 - onset. Whatever happens early leads: the last column has the lead of the step at which the "
        "training set was learned.",
        ONSET_NOTE,
        sign(runs),
        commutator_note(runs),
        setting_note(runs),
    ]
    return tabulate("grokking_onsets", "Onset of the defect and generalisation", rows, notes)


def _by_column(paper: Onsets) -> list[tuple[str, Sequence[float]]]:
    lead = [t90 - onset for t90, onset in zip(paper.t90, paper.onset, strict=False)]
    return [("onset", paper.onset), ("t90", paper.t90), ("stop", paper.stop), ("lead", lead)]


def _lead_of(run: GrokkingRun, name: str) -> float | None:
    step, t90 = run.steps[name], run.steps["t90"]
    return None if step is None or t90 is None else t90 - step


def rates(runs: Sequence[GrokkingRun]) -> Table:
    """Means over the runs that generalise, by learning rate, beside the paper's; for runs of several rates."""
    found = sorted({run.rate for run in runs if run.decay and run.name})
    rows: list[Row] = []
    for rate in found if len(found) > 1 else []:
        chosen = [run for run in runs if run.rate == rate and run.decay and run.groks and run.name]
        own = [clock_steps(run)[ONSET] for run in chosen]
        t90 = [run.steps["t90"] for run in chosen]
        lead = [value for value in leads(own, t90) if math.isfinite(value)]
        paper = RATES.get(rate) if not any(run.differs for run in chosen) else None
        ours: dict[str, Sequence[float | None]] = {
            "t90": t90,
            "onset": own,
            "train 99 %": [run.steps["train_99"] for run in chosen],
            "lead": lead,
        }
        cells: dict[str, Cell] = {"lr": word(plain(rate)), "runs": number(len(chosen), "{:.0f}")}
        theirs = (
            {} if paper is None else dict(zip(ours, (paper.t90, paper.onset, paper.train_99, paper.lead), strict=True))
        )
        for column, values in ours.items():
            known = [float(value) for value in values if value is not None]
            cells[column] = number(statistics.fmean(known) if known else None, _STEP)
            cells[f"{column}, paper"] = number(theirs.get(column), _STEP)
        cells["lead > 0"] = word(f"{sum(value > 0 for value in lead)} of {len(chosen)}")
        cells["lead > 0, paper"] = word("-" if paper is None else f"{paper.ahead} of {paper.runs}")
        rows.append(cells)
    notes = [_power_law([run for run in runs if run.decay and run.groks and run.name])]
    return tabulate("grokking_rates", "Onset and generalisation by learning rate", rows, notes)


def _power_law(runs: Sequence[GrokkingRun]) -> str:
    """Say what a log-log fit of lead against generalisation gives, or why there is none."""
    pairs = [(run, lead) for run in runs for lead in leads([clock_steps(run)[ONSET]], [run.steps["t90"]])]
    ahead = [(run, lead) for run, lead in pairs if lead > 0]
    try:
        fit = scaling(
            [run.steps["t90"] or 0 for run, _ in ahead], [lead for _, lead in ahead], [r.rate for r, _ in ahead]
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
