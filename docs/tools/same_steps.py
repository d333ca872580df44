"""Runs that are not of one length, or that share their first part, beside one another up to one step.

    python -m docs.tools.same_steps runs/live runs/builtin/seed42 --step 9000 --out controls/tables --name builtin

A folder of several runs, which differ in their seed, is one column: mean ± half of the 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mini_gpt_pl.command_line import one_line_errors
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.nulls import Calibrated, calibrate
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.sheet import Cell, Row, Table, gap, number, tabulate, word, write_tables
from mini_gpt_pl.report.statistics import t_interval
from mini_gpt_pl.runs.folder import Run, runs_below
from mini_gpt_pl.stories.study.learning import LOSS
from mini_gpt_pl.stories.switches import P_OOD

P_IN = "probe/p_in"


def geometry(run: Run, step: int) -> dict[str, Calibrated]:
    """Calibrate the path of a run from its start to a step.

    Raises:
        UserError: The run ended before it.
    """
    trajectory = run.trajectory
    if trajectory.steps[-1] < step:
        raise UserError(f"{run.path} has snapshots to step {trajectory.steps[-1]:,} only: give --step that or less")
    path = trajectory.until(step)
    return calibrate(path.gram(), path.survival, curves=True)


def learning(run: Run, step: int) -> dict[str, float]:
    """What a run had learned by a step, and when it was best."""
    loss, far, near = (run.series(name).loc[:step] for name in (LOSS, P_OOD, P_IN))
    last = step - (step // 3)
    return {
        "validation loss, lowest": float(loss.min()),
        "validation loss at the end": float(loss.iloc[-1]),
        "p_ood, highest": float(far.max()),
        f"p_ood, mean from step {last:,} on": float(far.loc[last:].mean()),
        "p_in, highest": float(near.max()),
        f"p_in, mean from step {last:,} on": float(near.loc[last:].mean()),
    }


def same_steps(columns: Sequence[tuple[str, Sequence[Run]]], step: int, name: str) -> Table:
    """Lay runs side by side up to one step.

    Args:
        columns: Name and runs of each column.
        step: Where all are cut.
        name: Of the table.
    """
    paths = {label: [geometry(run, step) for run in runs] for label, runs in columns}
    learned = {label: [learning(run, step) for run in runs] for label, runs in columns}
    rows: list[Row] = []
    for quantity in learned[columns[0][0]][0]:
        cells = {label: spread_cell([found[quantity] for found in learned[label]], "{:.3f}") for label, _ in columns}
        rows.append({"quantity": word(quantity), **cells})
    for key, one in statistics().items():
        words, form = one.title, one.format
        row = {"quantity": word(words)}
        for label, _ in columns:
            values = [found[key] for found in paths[label]]
            row[label] = spread_cell([value.value for value in values], form)
            row[f"{label}, excess"] = spread_cell([value.excess for value in values], form, difference=True)
        rows.append(row)
    notes = [
        f"Each path from its start to step {step:,}; the excess is over the decaying walk of the same steps.",
        "Of several seeds: mean ± half of the 95 % interval, by Student's t over them.",
    ]
    return tabulate(name, f"To step {step:,}", rows, notes)


def spread_cell(values: Sequence[float], form: str, *, difference: bool = False) -> Cell:
    """One number, or of several seeds their mean with half of its 95 % interval.

    Args:
        values: One of each run.
        form: Of a number, for `str.format`.
        difference: Whether they are gaps to a null, which have a sign and points instead of per cent.
    """
    write = (lambda value: gap(value, form)) if difference else (lambda value: number(value, form))
    if len(values) == 1:
        return write(values[0])
    mean, half = t_interval(values)
    cell = write(mean)
    spread = number(half, form.replace("+", "")).text
    return dataclasses.replace(cell, text=f"{cell.text} ± {spread.rstrip('%')}", extra={"95 %": half})


def main(args: Sequence[str] | None = None) -> None:
    """Write the table of the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, or folders of runs that differ in their seed")
    parser.add_argument("--step", type=int, required=True, help="where all are cut")
    parser.add_argument("--out", type=Path, required=True, help="folder of the table's two files")
    parser.add_argument("--name", default="same_steps", help="of the table")
    options = parser.parse_args(args)
    with one_line_errors():
        columns = [
            (folder.as_posix().removeprefix("runs/"), [Run(p) for p in runs_below(folder)]) for folder in options.runs
        ]
        for path in write_tables([same_steps(columns, options.step, options.name)], options.out):
            print(path)


if __name__ == "__main__":
    main()
