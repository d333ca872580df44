"""Tables of marker sums: accuracy by the number of markers, which takes the place of memorisation."""

from __future__ import annotations

from collections.abc import Sequence

from mini_gpt_pl.arithmetic.study.moments import MOMENTS_NOTE, markers, moments, recorded_at
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run

_SHARE, _STEP = "{:.1%}", "{:,.0f}"


def marker_table(run: Run) -> list[Table]:
    """Accuracy by number of markers at the moments of a run; nothing for a run of another task."""
    metrics = markers(run)
    if not metrics:
        return []
    rows: list[Row] = []
    for step, words in recorded_at(run, next(iter(metrics.values()))).items():
        row: dict[str, Cell] = {"moment": word(words), "step": number(step, _STEP)}
        row |= {
            f"m = {m}": number(float(run.series(name).get(step, float("nan"))), _SHARE) for m, name in metrics.items()
        }
        row["‖θ‖"] = number(float(run.series("eval/weight_norm").get(step, float("nan"))), "{:.1f}")
        rows.append(row)
    never = [words.removeprefix("90 % with ") for words, step in moments(run).items() if step is None]
    said = f"Never at 90 %: {', '.join(never)}." if never else None
    title = "Accuracy by number of markers"
    return [tabulate("grokking_markers", title, rows, [_chance(run), said, MOMENTS_NOTE])]


def _chance(run: Run) -> str:
    """What guessing gives."""
    task = (run.settings.get("data") or {}).get("task") or {}
    classes = task.get("classes") if isinstance(task, dict) else None
    by_chance = f" Guessing gives {1 / classes:.1%}." if classes else ""
    return f"Fresh examples in every batch, so that there is no training set to learn by heart.{by_chance}"


def marker_runs(runs: Sequence[Run]) -> list[Table]:
    """When each run reached 90 % with each number of markers, and what it ended at."""
    rows: list[Row] = []
    for run, label in names(runs).items():
        metrics, settings, steps = markers(run), facts(run), moments(run)
        if not metrics:
            continue
        row: dict[str, Cell] = {"run": word(label), "lr": word(plain(settings["learning rate"]))}
        row |= {"decay": word(plain(settings["weight decay"])), "seed": word(plain(settings["seed"]))}
        for m, name in metrics.items():
            step = steps[f"90 % with m = {m}"]
            row[f"90 %, m = {m}"] = word("never") if step is None else number(step, _STEP)
            row[f"end, m = {m}"] = number(run.last(name), _SHARE)
        rows.append(row)
    if not rows:
        return []
    return [tabulate("grokking_markers_runs", "Accuracy by number of markers", rows, [_chance(runs[0])])]
