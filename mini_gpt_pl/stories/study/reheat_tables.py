"""Reheated runs beside the published ones (paper, Table 11)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mini_gpt_pl.report.claims import Finding
from mini_gpt_pl.report.comparison import steps_cell
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain, progress
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run
from mini_gpt_pl.stories.study.beside import notes_of_runs, reheat_of

_NUMBERS = (
    ("lr", "lr", "{:g}"),
    ("factor", "factor", "{:g}"),
    ("moments", "moments", "{:g}"),
    ("p0", "p0", "{:.3f}"),
    ("peak", "peak", "{:.3f}"),
    ("peak_step", "at", "{:,.0f}"),
    ("gain", "gain", "{:+.3f}"),
    ("recovery", "recovery", "{:.2f}"),
    ("threshold", "threshold", "{:g}"),
    ("steps_to_threshold", "first there", "{:,.0f}"),
    ("final", "final", "{:.3f}"),
    ("along", "along v_b", "{:+.1f}"),
    ("across", "across", "{:.1f}"),
    ("coordinate_before", "a before", "{:.1f}"),
    ("coordinate_after", "a after", "{:.1f}"),
    ("residual_before", "||r|| before", "{:.1f}"),
    ("residual_after", "||r|| after", "{:.1f}"),
)
_COLUMN = "paper (51 M, from step 10,000)"
_PUBLISHED = ("p0", "peak", "peak_step", "gain", "steps_to_threshold", "final")


def reheats(runs: Sequence[Run], others: Sequence[Run] = (), called: Mapping[Run, str] | None = None) -> list[Table]:
    """Gain and displacement of reheated runs, then of controls, and what their parents did without either.

    Args:
        runs: Those of them that were reheated are shown, high learning rates first.
        others: Runs among which parents are looked for; a parent that went on past the reheated step is a control.
        called: Names of runs; their folders' for None.
    """
    called = called or names(list(dict.fromkeys((*runs, *others))))
    found = [(run, record) for run in runs if (record := run.lineage) is not None]
    if not found:
        return []
    found.sort(key=lambda pair: reheat_setting(*pair)[0])
    rows: list[Row] = [_row(run, record, called[run]) for run, record in found]
    rows += _controls([record for _, record in found], others, called)
    settings = {called[run]: reheat_of(run, record) for run, record in found}
    short = [called[run] for run, _ in found if _broke_off(run)]
    notes = [
        "p0: exact match at long gaps before the first step; gain: highest value minus p0, so never negative, and "
        "above zero by chance alone as it is a maximum over evaluations; recovery: gain over what the parent had lost; "
        "along and across: displacement from the reheated checkpoint, by the parent's v_b.",
        "Control: the parent's own schedule, moments and data going on, the gain that needs no reheating."
        if any(is_control(record) for _, record in found)
        else None,
        f"Broke off, so that their last values are no final ones: {', '.join(short)}." if short else None,
        *notes_of_runs(settings, _PUBLISHED),
    ]
    return [tabulate("table11_reheating", "Reheating (paper, Table 11)", rows, notes)]


def _broke_off(run: Run) -> bool:
    taken, asked = progress(run)
    return run.outcome is None and asked is not None and taken < asked


def _row(run: Run, record: Mapping[str, Any], name: str) -> Row:
    kind = "control" if is_control(record) else "reheated"
    cells: dict[str, Cell] = {"run": word(name), "kind": word(kind), **_origin(record)}
    cells["steps"] = steps_cell(run) if record.get("steps") else number(None)
    cells |= {column: _cell(record.get(key), form) for key, column, form in _NUMBERS}
    if isinstance(record.get("lr"), float):
        cells["lr"] = Cell(plain(record["lr"]), record["lr"])
    setting = reheat_of(run, record)
    for key, column, form in _NUMBERS:
        if key in _PUBLISHED:
            cells[f"{column}, {_COLUMN}"] = setting.only(key, form)
    return cells


def _origin(record: Mapping[str, Any]) -> dict[str, Cell]:
    parent, step = record.get("parent"), record.get("parent_step")
    return {"parent": word(Path(str(parent)).name if parent else "-"), "from step": _cell(step, "{:,.0f}")}


def _cell(value: Any, form: str) -> Cell:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return number(None) if value is None else word(str(value))
    return number(float(value), form)


def _controls(records: Sequence[Mapping[str, Any]], others: Sequence[Run], called: Mapping[Run, str]) -> list[Row]:
    """One row for each parent and step that was reheated: how p_ood went on without."""
    rows: list[Row] = []
    for parent, step in dict.fromkeys((record.get("parent"), record.get("parent_step")) for record in records):
        run = _parent(parent, others)
        values = pd.Series(dtype=float) if run is None else run.series("probe/p_ood")
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
    scratch = [run for run in others if run.lineage is None]
    by_folder = [run for run in scratch if path and run.path.resolve() == Path(str(path)).resolve()]
    by_name = [run for run in scratch if path and run.path.resolve().name == Path(str(path)).name]
    return next(iter(by_folder or by_name), None)


def is_control(record: Mapping[str, Any]) -> bool:
    """Whether a reheated run only went on with its parent's schedule."""
    return record.get("factor") == 1


def reheat_setting(run: Run, record: Mapping[str, Any]) -> tuple[float, str]:
    """What a reheat was done with: a key that puts high rates first and controls last, and words.

    Args:
        run: The reheated run.
        record: What it recorded of its parent.
    """
    if is_control(record):
        return math.inf, "control"
    if (factor := record.get("factor")) is not None:
        return -float(factor), f"the parent's rate × {plain(factor)}"
    rate = record.get("lr") or facts(run)["learning rate"]
    return (0.0, run.path.resolve().name) if rate is None else (-float(rate), f"lr {plain(float(rate))}")


def gains(runs: Sequence[Run]) -> Iterator[Finding]:
    """What reheating gained, beside the gain without it, in a sentence."""
    known = [(run, record) for run in runs if (record := run.lineage) is not None and record.get("gain") is not None]
    warm = [pair for pair in known if not is_control(pair[1])]
    if not warm:
        return
    warm.sort(key=lambda pair: reheat_setting(*pair)[0])
    each = ", ".join(f"{reheat_setting(run, record)[1]} {record['gain']:+.3f}" for run, record in warm)
    idle = [f"{record['gain']:+.3f}" for _, record in known if is_control(record)]
    without = f"; without reheating, the control: {', '.join(idle)}" if idle else "; there is no control"
    yield Finding("Gain in p_ood by reheating", f"{each}{without}.", "reheating")
