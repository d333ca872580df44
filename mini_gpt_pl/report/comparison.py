"""Tables over several runs of any task: how they ended, their paths beside the nulls, and intervals over seeds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mini_gpt_pl.errors import UserError
from mini_gpt_pl.metrics.registry import statistics
from mini_gpt_pl.report.families import families, names, one_of_each_seed
from mini_gpt_pl.report.settings import plain, progress
from mini_gpt_pl.report.sheet import NULLS, Cell, Row, Table, beside_nulls, gap, interval, number, tabulate, word
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
    counts: Counter[str] = Counter()
    numbered = []
    for table in tables:
        counts[table.name] += 1
        count = counts[table.name]
        numbered.append(table if count == 1 else replace(table, name=f"{table.name}_{count}"))
    return numbered


def ending(subject: Subject) -> dict[str, Cell]:
    """Cells that say how far a run came and how it ended."""
    ended = subject.outcome
    return {"steps": steps_cell(subject), "ended": word("not on record" if ended is None else ended.state)}


def steps_cell(run: Run) -> Cell:
    """Steps that a run took, and of how many where it did not take them all."""
    steps, asked = progress(run)
    whole = asked is None or steps >= asked
    return Cell(f"{steps:,}" if whole else f"{steps:,} of {asked:,}", float(steps))


def overview(subjects: Sequence[Subject], outcomes: Sequence[Row]) -> list[Table]:
    """All runs: what sets them apart, and further cells of each that say how they ended."""
    if len(subjects) < 2:
        return []
    of_runs = [subject.facts for subject in subjects]
    # How many steps a run took is said with how it ended.
    apart = [key for key in of_runs[0] if key != "steps" and len({repr(facts[key]) for facts in of_runs}) > 1]
    rows = []
    for subject, facts, outcome in zip(subjects, of_runs, outcomes, strict=True):
        settings = {key: word("-" if facts[key] is None else plain(facts[key])) for key in apart}
        rows.append({"run": word(subject.label), **settings, **outcome})
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
    for key, quantity in statistics().items():
        form = quantity.format
        numbers = [calibrated[key] for subject in subjects if key in (calibrated := subject.calibrated())]
        values = [one.value for one in numbers if not math.isnan(one.value)]
        excesses = [one.excess for one in numbers if not math.isnan(one.excess)]
        if len(values) > 1:
            row = {"quantity": word(quantity.title), **_mean_cells(values, form)}
            row["walk"] = number(mean([one.walk for one in numbers]), form)
            row["decaying walk"] = number(mean([one.decay for one in numbers]), form)
            if len(excesses) > 1:
                middle, half = t_interval(excesses)
                row["excess"] = gap(middle, form)
                row["excess, 95 %"] = interval(middle - half, middle + half, form)
            rows.append(row)
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
    return {
        "n": number(float(len(values)), "{:.0f}"),
        "mean": number(middle, form),
        "95 %": interval(middle - half, middle + half, form, number),
        "each": word(", ".join(form.format(value) for value in values)),
    }
