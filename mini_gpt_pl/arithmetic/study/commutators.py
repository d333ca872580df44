"""Tables of commutators: the defect step by step and around generalisation, and where the bracket points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mini_gpt_pl.arithmetic.study.runs import (
    TEST,
    TRAIN,
    Phase,
    ResidueRun,
    groups_of,
    lay_runs,
    median,
    run_values,
    spread,
)
from mini_gpt_pl.arithmetic.study.words import Value, Values, lay, metrics_of, words
from mini_gpt_pl.report.sheet import Table


def defect(run: ResidueRun) -> Table:
    """The commutator defect beside the gradient's length, and the forms of it without 1/‖g‖, step by step."""
    rows, own = [], run.phases[1:]
    for step in map(int, run.commutator("norm_a").index):
        phase = next((window.name for window in own if step <= window.last), own[-1].name if own else "-")
        row: dict[str, Value] = {"step": step, "phase": phase}
        row |= {"train": run.at(TRAIN, step), "test": run.at(TEST, step)}
        for column, name in metrics_of("grokking_defect").items():
            row[column] = float(run.commutator(name).get(step, math.nan))
        rows.append(row)
    return lay_runs("grokking_defect", rows, [run])


class Change(NamedTuple):
    """A defect around generalisation.

    The baseline is the median of the first three defects, 0.1 at least; before and after are the largest defects on
    the two sides of t90, over the baseline. Ratios are medians behind the stop over medians on the plateau, NaN for a
    run that does not generalise, and for one that ended at its stop: it says nothing of what comes after.
    """

    baseline: float
    before: float
    after: float
    ratios: dict[str, float]


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
    ratios = dict.fromkeys(metrics_of("grokking_defect_change").values(), math.nan)
    if t90 is not None and {"plateau", "after"} <= set(around):
        for name in ratios:
            after, before = (around[phase].middle(run.commutator(name)) for phase in ("after", "plateau"))
            ratios[name] = after / before
    before, after = (float(part.max()) / baseline if len(part) else math.nan for part in (early, late))
    return Change(baseline, before, after, ratios)


def defect_at_grok(runs: Sequence[ResidueRun]) -> Table:
    """Before and after generalisation: the defect over its baseline, and what else changes there."""
    rows: list[Values] = []
    for run in runs:
        if (change := change_at_grok(run)) is None:
            continue
        row = {**run_values(run, runs), **run.reached("test_90"), "D, baseline": change.baseline}
        row |= {"largest D before, × baseline": change.before, "largest D after, × baseline": change.after}
        row["paper, whole run"] = spread(run.published("onsets", {}).get("ratio", ()))
        row |= {column: change.ratios[name] for column, name in metrics_of("grokking_defect_change").items()}
        rows.append(row)
    return lay_runs("grokking_defect_change", rows, runs)


def last_defects(runs: Sequence[ResidueRun]) -> Table:
    """Defect at the end of every run, with the gradient's length and the form without it, beside the paper's."""
    rows: list[Values] = []
    for run in runs:
        if (steps := run.commutator("norm_a").index).empty:
            continue
        row = {**run_values(run, runs), "step": int(steps[-1]), "D": run.last(f"commutator/{run.reported}/defect")}
        row["D, paper"] = spread(run.published("last_defect", ()), "{:.4g}")
        for column, name in metrics_of("grokking_last_defect").items():
            row[column] = run.last(f"commutator/{run.reported}/{name}")
        row["records unresolved"] = float((run.commutator("resolved") < 1).mean())
        row["float32 below noise"] = float((run.commutator("float32_signal") < 1).mean())
        rows.append(row)
    return lay_runs("grokking_last_defect", rows, runs)


def _bases() -> dict[str, str]:
    bases: dict[str, str] = words("tables")["bases"]
    return bases


def projections(run: ResidueRun) -> Table:
    """How much of the bracket lies in each subspace, by phase, beside random directions of the same blocks."""
    rows: list[Values] = []
    for window in run.own_phases:
        rows += [
            {"window": window.words, "basis": basis, **held}
            for name, basis in _bases().items()
            if (held := _projected(run, name, window))
        ]
        value, null, signed = (
            window.middle(run.commutator(name)) for name in ("alignment_rms", "alignment_flip", "alignment")
        )
        if not math.isnan(value):
            row: Values = {"window": window.words, "basis": "the last increment", "inside": value, "same blocks": null}
            rows.append({**row, "over same blocks": value / null, "signed mean": signed})
    return lay("grokking_projections", rows)


def _projected(run: ResidueRun, basis: str, window: Phase) -> dict[str, float]:
    """Medians over a window of what one basis holds, and of its nulls; empty without records."""
    if not window.inside(run.commutator(f"on_{basis}")):
        return {}
    value, null, isotropic, ratio, below = (
        window.middle(run.commutator(f"on_{basis}{suffix}"))
        for suffix in ("", "_null", "_isotropic", "_ratio", "_below")
    )
    held = {"inside": value, "isotropic": isotropic, "over isotropic": value / isotropic}
    return held | {"same blocks": null, "over same blocks": ratio, "above": below}


def projections_of_runs(runs: Sequence[ResidueRun]) -> Table:
    """Share of the bracket inside subspaces by operation and phase, medians over seeds, beside the paper's ratios."""
    rows: list[Values] = []
    for group in groups_of(runs):
        for phase in ("memorisation", "plateau", "transition", "after"):
            windows = [(run, window) for run in group for window in run.phases[1:] if window.name == phase]
            for basis, said in _bases().items():
                of_runs = [held for run, window in windows if (held := _projected(run, basis, window))]
                if not of_runs:
                    continue
                middle = {key: median(held[key] for held in of_runs) for key in of_runs[0]}
                paper = group[0].published(f"on_{basis}", {})
                rows.append(
                    {
                        **run_values(group[0], runs, len(group)),
                        "phase": phase,
                        "basis": said,
                        "over isotropic": middle["over isotropic"],
                        "over isotropic, paper": paper.get(phase, paper.get("all phases")),
                        "over same blocks": middle["over same blocks"],
                        "above": middle["above"],
                    }
                )
    return lay_runs("grokking_projections_runs", rows, runs)
