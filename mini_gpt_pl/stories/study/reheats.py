"""Reheated runs beside the published ones (paper, Table 11 and Figure 4): table, figure and the sentence on gains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.figures import plotting
from mini_gpt_pl.figures.plotting import CHANGE, GREY, NULL, WIDTH, legend_below, line, palette
from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.comparison import steps_cell
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain, progress
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, word
from mini_gpt_pl.runs.folder import METRICS, Run
from mini_gpt_pl.stories.study.runs import reheat_beside
from mini_gpt_pl.stories.study.words import PublishedColumns, laid_out, numbers, words
from mini_gpt_pl.stories.switches import P_OOD

_WARM = (plotting.RESIDUAL, plotting.SWITCH, plotting.PC2, plotting.BACKBONE, "#7d3c98")


def reheated(runs: Sequence[Run]) -> list[tuple[Run, Mapping[str, Any]]]:
    """Those of the runs that were reheated from another, each with what it recorded of that, high rates first."""
    pairs = [(run, record) for run in runs if (record := run.lineage) is not None]
    return sorted(pairs, key=lambda pair: setting(*pair)[0])


def is_control(record: Mapping[str, Any]) -> bool:
    """Whether a reheated run only went on with its parent's schedule."""
    return record.get("factor") == 1


def setting(run: Run, record: Mapping[str, Any]) -> tuple[float, str]:
    """What a reheat was done with: a key that puts high rates first and controls last, and words."""
    if is_control(record):
        return math.inf, "control"
    if (factor := record.get("factor")) is not None:
        return -float(factor), f"the parent's rate × {plain(factor)}"
    rate = record.get("lr") or facts(run)["learning rate"]
    return (0.0, run.path.resolve().name) if rate is None else (-float(rate), f"lr {plain(float(rate))}")


# ------------------------------------------------------------------------------------------------------- table


def table(runs: Sequence[Run], others: Sequence[Run] = (), called: Mapping[Run, str] | None = None) -> list[Table]:
    """Gain and displacement of reheated runs, then of controls, and what their parents did without either.

    Args:
        runs: Those of them that were reheated are shown, high learning rates first.
        others: Runs among which parents are looked for; a parent that went on past the reheated step is a control.
        called: Names of runs; their folders' for None.
    """
    called = called or names(list(dict.fromkeys((*runs, *others))))
    pairs, shown = reheated(runs), numbers("table11_reheating", "columns")
    besides = {called[run]: reheat_beside(run, record) for run, record in pairs}
    published = PublishedColumns(besides, words("tables")["table11_reheating"]["published"])
    rows: list[Row] = []
    for run, record in pairs:
        parent = record.get("parent")
        row = {
            "run": word(called[run]),
            "kind": word("control" if is_control(record) else "reheated"),
            "parent": word(Path(str(parent)).name if parent else "-"),
            "from step": _cell(record.get("parent_step"), "{:,.0f}"),
            "steps": steps_cell(run) if record.get("steps") else number(None),
            **{one.words: _cell(record.get(one.key), one.form) for one in shown},
        }
        if isinstance(lr := record.get("lr"), float):
            row["lr"] = Cell(plain(lr), lr)
        rows.append(row | published.cells(called[run], [one for one in shown if one.published]))
    return laid_out(
        "table11_reheating",
        rows + _parents([record for _, record in pairs], others, called),
        published.notes,
        controls=any(is_control(record) for _, record in pairs),
        short=", ".join(called[run] for run, _ in pairs if run.outcome is None and _ended_early(run)),
    )


def _ended_early(run: Run) -> int | None:
    """Steps that a run took of more that it was to take; None where it took them all."""
    steps, wanted = progress(run)
    return steps if wanted is not None and steps < wanted else None


def _cell(value: Any, form: str) -> Cell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number(None) if value is None else word(str(value))
    return number(float(value), form)


def _parents(records: Sequence[Mapping[str, Any]], others: Sequence[Run], called: Mapping[Run, str]) -> list[Row]:
    """One row for each parent and step that was reheated: how p_ood went on without."""
    rows: list[Row] = []
    for parent, step in dict.fromkeys((record.get("parent"), record.get("parent_step")) for record in records):
        run = _parent(parent, others)
        values = pd.Series(dtype=float) if run is None else run.series(P_OOD)
        later = values[values.index >= (step or 0)]
        if run is None or step is None or later.empty:
            continue
        cells = {"run": word(called[run]), "kind": word("not reheated"), "from step": _cell(step, "{:,.0f}")}
        cells |= {"p0": number(float(later.iloc[0])), "final": number(float(later.iloc[-1]))}
        if len(later) > 1:
            gain = float(later.max() - later.iloc[0])
            at = float(later.index[int(later.argmax())]) - float(step)
            cells |= {"peak": number(float(later.max())), "at": number(at, "{:,.0f}"), "gain": number(gain, "{:+.3f}")}
        rows.append(cells)
    return rows


def _parent(path: Any, others: Sequence[Run]) -> Run | None:
    """Find a parent by its folder, or by its name if the runs were moved since."""
    if not path:
        return None
    scratch = [run for run in others if run.lineage is None]
    by_folder = [run for run in scratch if run.path.resolve() == Path(str(path)).resolve()]
    by_name = [run for run in scratch if run.path.resolve().name == Path(str(path)).name]
    return next(iter(by_folder or by_name), None)


def gains(runs: Sequence[Run]) -> Iterator[Finding]:
    """What reheating gained, beside the gain without it, in a sentence."""
    pairs = [(run, record) for run, record in reheated(runs) if record.get("gain") is not None]
    warm = [f"{setting(run, record)[1]} {record['gain']:+.3f}" for run, record in pairs if not is_control(record)]
    idle = [f"{record['gain']:+.3f}" for _, record in pairs if is_control(record)]
    without = f"; without reheating, the control: {', '.join(idle)}" if idle else "; there is no control"
    if warm:
        yield Finding("Gain in p_ood by reheating", f"{', '.join(warm)}{without}.", "reheating")


# ------------------------------------------------------------------------------------------------------ figure


def figure(runs: Sequence[Run]) -> Figure:
    """p_ood of reheated runs at parent step + own step, by learning rate, their parents' in light grey.

    A star marks each maximum; controls, for which the parent's own schedule just goes on, are dashed.

    Raises:
        UserError: None of the runs was reheated from another.
    """
    pairs = [(run, record) for run in runs if (record := run.lineage) is not None]
    if not pairs:
        raise UserError("none of the runs is reheated: there is no re-entry to show")
    drawn = Figure(figsize=(WIDTH, 4.2))
    axes = drawn.subplots()
    parents = [Run(Path(str(record["parent"]))) for _, record in pairs if record.get("parent")]
    for parent in {str(run.path): run for run in parents if (run.path / METRICS).is_file()}.values():
        series = parent.series(P_OOD)
        best = "" if series.empty else f": best {series.max():.3f} at {int(series.index[int(series.argmax())]):,}"
        line(axes, series, f"parent, {parent.path.name}{best}", GREY, lw=1.2)
    settings = sorted({setting(run, record) for run, record in pairs if not is_control(record)})
    colours = dict(zip(settings, _WARM if len(settings) <= len(_WARM) else palette(len(settings)), strict=False))
    for run, record in pairs:
        _draw(axes, run, record, colours.get(setting(run, record), NULL))
    starts = [int(record.get("parent_step") or 0) for _, record in pairs]
    for start in set(starts) - {0}:
        axes.axvline(start, color=CHANGE, ls="--", lw=1, zorder=0)
    axes.set(xlabel="step (parent's + own)", ylabel="$p_{ood}$", ylim=(-0.03, 1.03), title="Reheating")
    longest = max((int(series.index[-1]) for run, _ in pairs if len(series := run.series(P_OOD))), default=0)
    if longest:  # as far before the earliest reheat as the longest one goes on; the parents are far longer
        margin = 0.03 * longest
        axes.set_xlim(max(0, min(starts) - longest) - margin, max(starts) + longest + margin)
    legend_below(axes)
    return drawn


def _draw(axes: Axes, run: Run, record: Mapping[str, Any], colour: Any) -> None:
    series = run.series(P_OOD)
    if not len(series):
        return
    steps = series.index.to_numpy() + int(record.get("parent_step") or 0)
    gain, early = record.get("gain"), _ended_early(run)
    label = setting(run, record)[1] + ("" if gain is None else f": G = {gain:+.3f}")
    label += "" if early is None else f", ended at {early:,}"
    style = "--" if is_control(record) else "o-"
    axes.plot(steps, series.to_numpy(), style, ms=3, lw=1.1, color=colour, label=label)
    best = int(np.argmax(series.to_numpy()))
    axes.plot([steps[best]], [series.iloc[best]], "*", ms=12, color=colour, mec="white", mew=0.6)
