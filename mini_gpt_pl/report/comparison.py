"""Tables over several runs of any task: how they ended, their paths beside the nulls, and intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.geometry.path.nulls import Calibrated
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.families import families, names, one_of_each_seed
from mini_gpt_pl.report.settings import plain, progress
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, gap, number, tabulate, word
from mini_gpt_pl.report.statistics import mean, t_interval
from mini_gpt_pl.report.subject import Subject
from mini_gpt_pl.runs.folder import Run, require_reportable

_SHOWN = ("pc1", "pc1_unit", "k95_unit", "cos_theta0", "persistence")
_ALIKE = ("model", "weights", "tokenizer", "context", "modulus")
"""Facts that runs of one report share: the geometry is of the same weights, trained on the same data."""


def require_comparable(runs: Sequence[Run]) -> None:
    """Check that runs belong into one report.

    Data seed, optimizer and length may differ; what the geometry is of may not.

    Raises:
        UserError: A run is no reportable one, a folder is named twice, or two runs have other models, tokenizers or
            weight selections.
    """
    for run in runs:
        require_reportable(run)
    seen: dict[Any, Run] = {}
    for run in runs:
        if (same := seen.setdefault(run.path.resolve(), run)) is not run:
            raise UserError(f"the runs {same.path} and {run.path} are the same folder: name it once")
    for run in runs[1:]:
        if differ := _differ(Subject.of(runs[0]), Subject.of(run)):
            raise UserError(f"the runs {runs[0].path} and {run.path} cannot be compared: {differ}; report them apart")


def _differ(a: Subject, b: Subject) -> str | None:
    """Say what keeps two runs from being compared; None if nothing does."""
    if a.task != b.task:
        return f"their tasks are {a.task or 'none that is listed'} and {b.task or 'none that is listed'}"
    for key in _ALIKE:
        one, other = a.facts.get(key), b.facts.get(key)
        if None not in (one, other) and one != other:
            return f"{key} {one} and {other}"
    if a.trajectory.fingerprint != b.trajectory.fingerprint:
        dims = f"{a.trajectory.dim:,} and {b.trajectory.dim:,} values"
        return f"their recorders select different weights ({dims})"
    return None


def subjects_of(runs: Sequence[Run], bootstrap: int | None = None) -> list[Subject]:
    """Runs as subjects, called by names that tell them apart."""
    return [Subject.of(run, name, bootstrap) for run, name in names(runs).items()]


def general_comparison(runs: Sequence[Run]) -> list[Table]:
    """Make the tables that runs of any task have: how they ended, and their paths; intervals over seeds."""
    subjects = subjects_of(runs)
    moved = [subject for subject in subjects if subject.moved]
    tables = overview(subjects, [ending(subject) for subject in subjects]) + geometry(moved)
    for part in grouped(moved, ("seed",)):
        kept = one_of_each_seed(part)
        if len(kept) > 1:
            tables += seeds(kept)
    return unique(tables)


def grouped(subjects: Sequence[Subject], ignore: Sequence[str]) -> list[list[Subject]]:
    """Gather runs whose configurations agree in everything but some facts, in the order in which they were given."""
    return [group for group in families(subjects, *ignore) if len(group) > 1]


def unique(tables: Sequence[Table]) -> list[Table]:
    """Number tables of one name, so that none overwrites another's file."""
    seen: dict[str, int] = {}
    found = []
    for table in tables:
        seen[table.name] = count = seen.get(table.name, 0) + 1
        found.append(table if count == 1 else replace(table, name=f"{table.name}_{count}"))
    return found


# --------------------------------------------------------------------------------------------------- how they ended


def ending(subject: Subject) -> dict[str, Cell]:
    """Cells that say how far a run came and how it ended."""
    ended = subject.outcome
    return {"steps": steps_cell(subject), "ended": word("not on record" if ended is None else ended.state)}


def steps_cell(run: Run) -> Cell:
    """Steps that a run took, and of how many where it did not take them all."""
    taken, asked = progress(run)
    whole = asked is None or taken >= asked
    return Cell(f"{taken:,}" if whole else f"{taken:,} of {asked:,}", float(taken))


def overview(subjects: Sequence[Subject], outcomes: Sequence[Row]) -> list[Table]:
    """All runs: what sets them apart, and how they ended.

    Args:
        subjects: The runs.
        outcomes: Further cells of each.
    """
    if len(subjects) < 2:
        return []
    found = [subject.facts for subject in subjects]
    # How many steps is told with how it ended.
    apart = [key for key in found[0] if key != "steps" and len({repr(one[key]) for one in found}) > 1]
    rows = [
        {
            "run": word(subject.label),
            **{key: word("-" if one[key] is None else plain(one[key])) for key in apart},
            **outcome,
        }
        for subject, one, outcome in zip(subjects, found, outcomes, strict=True)
    ]
    same = None if apart else "They differ in nothing that decides how a run goes."
    return [tabulate("runs", "The runs", rows, [same])]


def geometry(subjects: Sequence[Subject]) -> list[Table]:
    """All runs beside their nulls."""
    rows: list[Row] = [
        {
            "quantity": word(statistics()[name].title),
            "run": word(subject.label),
            **beside_nulls(subject.calibrated()[name], statistics()[name].format),
        }
        for name in _SHOWN
        for subject in subjects
    ]
    title = "The runs against their nulls"
    return [tabulate("runs_geometry", title, rows, [NULLS])] if len(subjects) > 1 else []


# --------------------------------------------------------------------------------------------------------- seeds


def seeds(
    subjects: Sequence[Subject], metrics: Sequence[tuple[str, str, str]] = (), name: str = "seeds"
) -> list[Table]:
    """Mean over seeds and its t interval, of every statistic and of its excess over the decaying walk.

    Args:
        subjects: Runs that differ in their seed only.
        metrics: Logged ones to begin with: name, words, and `last` or `highest`.
        name: File stem.
    """
    rows: list[Row] = []
    for metric, words, which in metrics:
        series = [subject.series(metric) for subject in subjects]
        values = [float(s.max() if which == "highest" else s.iloc[-1]) for s in series if len(s)]
        if len(values) > 1:
            rows.append({"quantity": word(words), **_mean_cells(values, "{:.3f}")})
    calibrated = [found for subject in subjects if (found := subject.calibrated())]
    for key, one in statistics().items():
        words, form = one.title, one.format
        numbers = [found[key] for found in calibrated if key in found]
        values = [value.value for value in numbers if not math.isnan(value.value)]
        excesses = [value.excess for value in numbers if not math.isnan(value.excess)]
        if len(values) > 1:
            rows.append({"quantity": word(words), **_mean_cells(values, form), **_null_cells(numbers, excesses, form)})
    if not rows:
        return []
    chosen = ", ".join(f"{subject.facts['seed']} ({subject.label})" for subject in subjects)
    notes = [
        f"Seeds {chosen}; intervals are Student's t over the seeds, n = {len(subjects)}.",
        "Walks as in each run's own tables; the excess is over the decaying walk of the same run.",
    ]
    return [tabulate(name, "Over seeds", rows, notes)]


def _mean_cells(values: Sequence[float], form: str) -> dict[str, Cell]:
    middle, half = t_interval(values)
    ends = f"{form.format(middle - half)} to {form.format(middle + half)}"
    return {
        "n": number(float(len(values)), "{:.0f}"),
        "mean": number(middle, form),
        "95 %": Cell(ends, None, {"low": middle - half, "high": middle + half}),
        "each": word(", ".join(form.format(value) for value in values)),
    }


def _null_cells(numbers: Sequence[Calibrated], excesses: Sequence[float], form: str) -> dict[str, Cell]:
    cells = {
        "walk": number(mean([value.walk for value in numbers]), form),
        "decaying walk": number(mean([value.decay for value in numbers]), form),
    }
    if len(excesses) > 1:
        middle, half = t_interval(excesses)
        low, high = middle - half, middle + half
        cells["excess"] = gap(middle, form)
        ends = {"low": low, "high": high}
        cells["excess, 95 %"] = Cell(f"{gap(low, form).text} to {gap(high, form).text}", None, ends)
    return cells
