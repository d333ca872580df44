"""Tables of runs with several tasks on one trunk: when each generalises, and what their batches do to one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mini_gpt_pl.arithmetic.multitask import milestones_of
from mini_gpt_pl.arithmetic.study.runs import COLUMNS, Phase, ResidueRun, median
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import METRICS, Run

_SHARE, _STEP = "{:.1%}", "{:,.0f}"


def tasks_of(run: Run) -> tuple[str, ...]:
    """Tasks of a run in the order of its heads; none for a run of a single one, or that was not evaluated."""
    if run.task != "multitask" or not (run.path / METRICS).is_file():
        return ()
    operations = (run.settings.get("data") or {}).get("operations") or ()
    return tuple(str(name) for name in operations if len(run.series(f"eval/test_{name}_accuracy")))


def multitask_tables(run: Run) -> list[Table]:
    """Milestones of each task, and commutators across tasks; nothing for a run of a single task."""
    if not tasks_of(run):
        return []
    return [table for table in (_milestones(run), _commutators(run)) if not table.frame.empty]


def _milestones(run: Run) -> Table:
    rows: list[Row] = []
    for task in tasks_of(run):
        row: dict[str, Cell] = {"task": word(task)}
        row |= {COLUMNS[name]: _step(step) for name, step in milestones_of(run, task).items()}
        row["training accuracy at the end"] = number(run.last(f"eval/train_{task}_accuracy"), _SHARE)
        row["test accuracy at the end"] = number(run.last(f"eval/test_{task}_accuracy"), _SHARE)
        rows.append(row)
    note = (
        "t50 to t98: first evaluation with that test accuracy of the task; stop: the third in a row with 98 %. Other "
        "tables take the accuracy of the task that is worst."
    )
    return tabulate("grokking_tasks", "When each task is learned", rows, [note])


def _step(step: int | None) -> Cell:
    return word("never") if step is None else number(step, _STEP)


# ------------------------------------------------------------------------------------------------- commutators


def commutators_of(run: Run) -> dict[tuple[str, str], str]:
    """Names of the commutator probes that took a task's loss for each of the two batches, by these tasks."""
    names = {}
    for settings in run.callback_settings("CommutatorProbe"):
        losses, name = settings.get("losses"), str(settings.get("name", "all"))
        if losses and len(run.series(f"commutator/{name}/norm_a")):
            names[str(losses[0]), str(losses[1])] = name
    return names


_NUMBERS = {
    "D": ("defect", "{:.3g}"),
    "‖g_A‖": ("norm_a", "{:.3g}"),
    "‖g_B‖": ("norm_b", "{:.3g}"),
    "cos(g_A, g_B)": ("gradient_cosine", "{:+.3f}"),
    "c": ("c", "{:.3g}"),
    "relative": ("relative", "{:.2f}"),
}


def _commutators(run: Run) -> Table:
    probes = commutators_of(run)
    one = ResidueRun.of(run)
    rows: list[Row] = []
    for window in one.phases[1:] or [one.cut]:
        scaled = {pair: _middle(run, name, "c", window) for pair, name in probes.items()}
        for pair, name in probes.items():
            row: dict[str, Cell] = {"window": word(window.words), "batch A": word(pair[0]), "batch B": word(pair[1])}
            for column, (metric, form) in _NUMBERS.items():
                row[column] = number(_middle(run, name, metric, window), form)
            row["c over that within tasks"] = number(_over_within(scaled, pair), "{:.2f}")
            if not math.isnan(scaled[pair]):
                rows.append(row)
    note = (
        "Each batch takes the loss of its own task; medians over the records of a phase of the task that is worst. "
        "What a task does with itself is the comparison: c over the geometric mean of the two tasks' own c is 1 where "
        "two tasks disturb each other as two batches of one task do. Where a task has no commutator of its own there "
        "is none. cos: 0 for independent gradients."
    )
    return tabulate("grokking_cross_task", "Commutators across tasks", rows, [note])


def _middle(run: Run, probe: str, metric: str, window: Phase) -> float:
    """Median over the records of a window, its first step left out."""
    series = run.series(f"commutator/{probe}/{metric}")
    return median(series[(series.index > window.first) & (series.index <= window.last)].tolist())


def _over_within(scaled: Mapping[tuple[str, str], float], pair: tuple[str, str]) -> float:
    """A pair's value over the geometric mean of those that its tasks have with themselves."""
    within = math.sqrt(math.prod(scaled.get((task, task), math.nan) for task in pair))
    return scaled[pair] / within if within > 0 and pair[0] != pair[1] else math.nan


# -------------------------------------------------------------------------------------------------- several runs


def order_of(run: Run, milestone: str = "test_90") -> list[str] | None:
    """Tasks in the order in which they reached a milestone; None if one did not, or two did at once."""
    steps = {task: milestones_of(run, task)[milestone] for task in tasks_of(run)}
    if None in steps.values() or len(set(steps.values())) < len(steps):
        return None
    return sorted(steps, key=lambda task: steps[task] or 0)


def tasks_table(runs: Sequence[Run]) -> list[Table]:
    """When each task of each run generalised, and in which order."""
    rows: list[Row] = []
    for run, label in names(runs).items():
        tasks, settings = tasks_of(run), facts(run)
        if not tasks:
            continue
        row: dict[str, Cell] = {"run": word(label), "lr": word(plain(settings["learning rate"]))}
        row |= {"decay": word(plain(settings["weight decay"])), "seed": word(plain(settings["seed"]))}
        row |= {f"t90, {task}": _step(milestones_of(run, task)["test_90"]) for task in tasks}
        order = order_of(run)
        row["order"] = word("not told apart" if order is None else ", ".join(order))
        row["steps"] = number(int(run.metrics.index[-1]), _STEP)
        rows.append(row)
    note = "t90: first evaluation with 90 % test accuracy of the task. Not told apart: two at once, or one never."
    return [tabulate("grokking_tasks_runs", "When each task generalises", rows, [note])] if rows else []


def same_tasks(runs: Sequence[Run]) -> list[Run]:
    """Runs with several tasks, of one set of tasks: the largest such family."""
    families: dict[frozenset[str], list[Run]] = {}
    for run in runs:
        if tasks := tasks_of(run):
            families.setdefault(frozenset(tasks), []).append(run)
    return max(families.values(), key=len, default=[])


def t90_of(run: Run) -> int | None:
    """First evaluation at which all tasks have 90 % of the test set.

    Raises:
        UserError: It has no tasks.
    """
    if not tasks_of(run):
        raise UserError(f"{run.path} has no tasks that were evaluated apart")
    return ResidueRun.of(run).steps["test_90"]
