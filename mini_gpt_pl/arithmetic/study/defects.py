"""Tables over runs of the second task: the commutator defect around generalisation, at the end, and where it points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mini_gpt_pl.arithmetic.study.commutators import BASES, GRADIENTS_NOTE, inside, projected
from mini_gpt_pl.arithmetic.study.groups import (
    commutator_note,
    group_cells,
    groups_of,
    published_onsets,
    run_cells,
    setting_note,
    spread,
)
from mini_gpt_pl.arithmetic.study.published import (
    LAST_DEFECT,
    NOTES,
    ON_PATH,
    ON_SINGULAR,
)
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, median, reached
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word

_STEP = "{:,.0f}"


@dataclass(frozen=True)
class Change:
    """A defect around generalisation.

    Ratios are NaN for a run that does not generalise, and for one that has no records behind its stop: one that ended
    there says nothing of what comes after.

    Args:
        baseline: Median of the first three defects, 0.1 at least.
        before: Largest defect before t90 over the baseline.
        after: Largest defect from t90 on over the baseline; NaN without t90.
        defect: D behind the stop over D on the plateau, medians.
        gradient: The same of ‖g‖.
        c: The same of c.
        c_theta2: The same of c‖θ‖².
    """

    baseline: float
    before: float
    after: float
    defect: float
    gradient: float
    c: float
    c_theta2: float


def change_at_grok(run: ResidueRun) -> Change | None:
    """Compare the defect before and after a run generalises; None without a commutator probe."""
    values = run.commutator("defect")
    if len(values) < 4:
        return None
    baseline = max(float(values.iloc[:3].median()), 0.1)
    t90 = run.steps["test_90"]
    early = values if t90 is None else values[values.index < t90]
    late = values[values.index >= t90] if t90 is not None else values[:0]
    around = {window.name: window for window in run.phases[1:]}
    ratios = [math.nan] * 4
    if t90 is not None and {"plateau", "after"} <= set(around):
        ratios = [
            median(inside(run.commutator(name), around["after"]).tolist())
            / median(inside(run.commutator(name), around["plateau"]).tolist())
            for name in ("defect", "norm_a", "c", "c_theta2")
        ]
    before = float(early.max()) / baseline if len(early) else math.nan
    after = float(late.max()) / baseline if len(late) else math.nan
    return Change(baseline, before, after, *ratios)


def defect_at_grok(runs: Sequence[ResidueRun]) -> Table:
    """Before and after generalisation: the defect over its baseline, and what else changes there."""
    rows: list[Row] = []
    for run in runs:
        change = change_at_grok(run)
        if change is None:
            continue
        cells: dict[str, Cell] = {**run_cells(run, runs), "t90": reached(run, "test_90")}
        cells |= {"D, baseline": number(change.baseline, "{:.2f}")}
        cells["largest D before, × baseline"] = number(change.before, "{:.0f}")
        cells["largest D after, × baseline"] = number(change.after, "{:.0f}")
        cells["paper, whole run"] = spread(published_onsets(run).get("ratio", ()), "{:,.0f}")
        for column, value in (
            ("D", change.defect),
            ("‖g‖", change.gradient),
            ("c", change.c),
            ("c‖θ‖²", change.c_theta2),
        ):
            cells[f"{column}: after / before"] = number(value, "{:.2g}")
        rows.append(cells)
    notes = [
        "Baseline: median of the first three defects, in float64. Before and after t90; a run without one is all "
        "before. After / before: median of the records behind the stop over the median of those between 99 % of the "
        "training set and 10 % of the test set.",
        NOTES["onset"],
        commutator_note(runs),
        setting_note(runs),
    ]
    return tabulate("grokking_defect_change", "What jumps when a run generalises: the defect, or 1/‖g‖?", rows, notes)


def last_defects(runs: Sequence[ResidueRun]) -> Table:
    """Defect at the end of every run, with the gradient's length and the form without it, beside the paper's."""
    rows: list[Row] = []
    for run in runs:
        if run.commutator("norm_a").empty:
            continue
        published = LAST_DEFECT.get(run.operation, ()) if run.repeats and run.decay else ()
        step = int(run.commutator("norm_a").index[-1])
        cells: dict[str, Cell] = {**run_cells(run, runs), "step": number(step, _STEP)}
        cells["D"] = number(run.last(f"commutator/{run.reported}/defect"), "{:.4g}")
        cells["D, paper"] = spread(published, "{:.4g}")
        for column, name, form in (
            ("‖g‖", "norm_a", "{:.2g}"),
            ("‖g_B‖", "norm_b", "{:.2g}"),
            ("cos(g_A, g_B)", "gradient_cosine", "{:+.2f}"),
            ("‖bracket‖", "bracket", "{:.2g}"),
            ("c", "c", "{:.3g}"),
            ("relative", "relative", "{:.2f}"),
            ("float32 signal", "float32_signal", "{:.2g}"),
        ):
            cells[column] = number(run.last(f"commutator/{run.reported}/{name}"), form)
        resolved = run.commutator("resolved")
        cells["records unresolved"] = number(float((resolved < 1).mean()), "{:.0%}")
        cells["float32 below noise"] = number(float((run.commutator("float32_signal") < 1).mean()), "{:.0%}")
        rows.append(cells)
    notes = [
        "Unresolved: share of the records in which some bracket was below rounding in float64. Below noise: share in "
        "which a difference of float32 weights would have been.",
        GRADIENTS_NOTE,
        NOTES["last_defect"],
        NOTES["onset"],
        commutator_note(runs),
        setting_note(runs),
    ]
    return tabulate("grokking_last_defect", "Defect at the end of each run", rows, notes)


def projections(runs: Sequence[ResidueRun]) -> Table:
    """Share of the bracket inside subspaces by operation and phase, medians over seeds, beside the paper's ratios."""
    rows: list[Row] = []
    for group in groups_of(runs):
        for phase in ("memorisation", "plateau", "transition", "after"):
            for basis, words in BASES.items():
                cells = _projection(group, phase, basis)
                if cells is not None:
                    head = {**group_cells(group, runs), "phase": word(phase), "basis": word(words)}
                    rows.append(head | cells)
    notes = [
        "Length of the bracket inside the subspace over that of random directions: isotropic in all weights (as "
        "published), and inside the same matrices, which is the matched null; medians over records and seeds. Above: "
        "share of the matched random subspaces that hold less, 0.5 by chance.",
        NOTES["projection"],
        commutator_note(runs),
        setting_note(runs),
    ]
    return tabulate("grokking_projections_runs", "Where the commutator points", rows, notes)


def _projection(group: Sequence[ResidueRun], phase: str, basis: str) -> dict[str, Cell] | None:
    of_runs = []
    for run in group:
        window = next((window for window in run.phases[1:] if window.name == phase), None)
        if window is not None and len(inside(run.commutator(f"on_{basis}"), window)):
            of_runs.append(projected(run, basis, window))
    if not of_runs:
        return None
    first = group[0]
    paper = math.nan
    if first.decay and first.repeats:
        if basis == "path":
            paper = ON_PATH.get(first.operation, math.nan)
        if basis == "singular":
            paper = ON_SINGULAR.get(phase, {}).get(first.operation, math.nan)
    middle = {
        key: median([float(value) for cells in of_runs if (value := cells[key].value) is not None])
        for key in of_runs[0]
    }
    return {
        "over isotropic": number(middle["over isotropic"], "{:.2f}"),
        "over isotropic, paper": number(paper, "{:.2f}"),
        "over same blocks": number(middle["over same blocks"], "{:.2f}"),
        "above": number(middle["above"], "{:.2f}"),
    }
