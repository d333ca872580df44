"""Runs with several tasks on one trunk: when each generalises, their commutators, weight decay, and what is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mini_gpt_pl.arithmetic.multitask import milestones_of
from mini_gpt_pl.arithmetic.statistics import onset
from mini_gpt_pl.arithmetic.statistics.scaling import scaling
from mini_gpt_pl.arithmetic.study.runs import COLUMNS, ResidueRun, median, residue_runs, settings_of, step_of
from mini_gpt_pl.arithmetic.study.words import Value, Values, claim, lay, metrics_of, words
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.claims import Claim, claims_table
from mini_gpt_pl.report.families import names
from mini_gpt_pl.report.settings import facts, plain
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import METRICS, Run

Pair = tuple[str, str]


def tasks_of(run: Run) -> tuple[str, ...]:
    """Tasks of a run in the order of its heads; none for a run of a single one, or that was not evaluated."""
    if run.task != "multitask" or not (run.path / METRICS).is_file():
        return ()
    operations = (run.settings.get("data") or {}).get("operations") or ()
    return tuple(str(name) for name in operations if len(run.series(f"eval/test_{name}_accuracy")))


def multitask_tables(run: Run) -> list[Table]:
    """Milestones of each task, and commutators across tasks; nothing for a run of a single task."""
    return [_milestones(run), _commutators(run)] if tasks_of(run) else []


def _milestones(run: Run) -> Table:
    rows: list[Values] = []
    for task in tasks_of(run):
        row: dict[str, Value] = {"task": task}
        row |= {COLUMNS[name]: step_of(step) for name, step in milestones_of(run, task).items()}
        row["training accuracy at the end"] = run.last(f"eval/train_{task}_accuracy")
        row["test accuracy at the end"] = run.last(f"eval/test_{task}_accuracy")
        rows.append(row)
    return lay("grokking_tasks", rows)


def commutators_of(run: Run) -> dict[Pair, str]:
    """Names of the commutator probes that took a task's loss for each of the two batches, by these tasks."""
    probes = {}
    for settings in run.callback_settings("CommutatorProbe"):
        losses, name = settings.get("losses"), str(settings.get("name", "all"))
        if losses and len(run.series(f"commutator/{name}/norm_a")):
            probes[str(losses[0]), str(losses[1])] = name
    return probes


def _commutators(run: Run) -> Table:
    probes, rows = commutators_of(run), []
    for window in ResidueRun.of(run).own_phases:
        scaled = {pair: window.middle(run.series(f"commutator/{name}/c")) for pair, name in probes.items()}
        for pair, name in probes.items():
            row: dict[str, Value] = {"window": window.words, "batch A": pair[0], "batch B": pair[1]}
            for column, metric in metrics_of("grokking_cross_task").items():
                row[column] = window.middle(run.series(f"commutator/{name}/{metric}"))
            # Over the geometric mean of what the two tasks have with themselves.
            within = math.sqrt(math.prod(scaled.get((task, task), math.nan) for task in pair))
            row["c over that within tasks"] = scaled[pair] / within if within > 0 and pair[0] != pair[1] else None
            if not math.isnan(scaled[pair]):
                rows.append(row)
    return lay("grokking_cross_task", rows)


def order_of(run: Run, milestone: str = "test_90") -> list[str] | None:
    """Tasks in the order in which they reached a milestone; None if one did not, or two did at once."""
    steps = {task: milestones_of(run, task)[milestone] for task in tasks_of(run)}
    if None in steps.values() or len(set(steps.values())) < len(steps):
        return None
    return sorted(steps, key=lambda task: steps[task] or 0)


def tasks_table(runs: Sequence[Run]) -> list[Table]:
    """When each task of each run generalised, and in which order."""
    rows: list[Values] = []
    for run, label in names(runs).items():
        if not (tasks := tasks_of(run)):
            continue
        row: dict[str, Value] = {"run": label, **settings_of(run)}
        row |= {f"t90, {task}": step_of(milestones_of(run, task)["test_90"]) for task in tasks}
        order = order_of(run)
        row["order"] = "not told apart" if order is None else ", ".join(order)
        rows.append(row | {"steps": int(run.metrics.index[-1])})
    return [lay("grokking_tasks_runs", rows)] if rows else []


def same_tasks(runs: Sequence[Run]) -> list[Run]:
    """Runs with several tasks, of one set of tasks: the largest such family."""
    families: dict[frozenset[str], list[Run]] = {}
    for run in runs:
        if tasks := tasks_of(run):
            families.setdefault(frozenset(tasks), []).append(run)
    return max(families.values(), key=len, default=[])


def decay_families(runs: Sequence[Run]) -> list[list[ResidueRun]]:
    """Runs that differ in their decay and seed only, where there are two positive decays."""
    families: dict[tuple[object, ...], list[ResidueRun]] = {}
    for run in residue_runs(runs):
        data = {k: v for k, v in (run.settings.get("data") or {}).items() if k not in ("seed", "split_seed")}
        families.setdefault((run.operation, run.rate, repr(data)), []).append(run)
    return [family for family in families.values() if len({run.decay for run in family if run.decay}) > 1]


def decay_table(runs: Sequence[Run]) -> list[Table]:
    """When runs of one kind generalise, by weight decay; nothing without two positive decays."""
    rows: list[Values] = []
    fitted: list[str] = []
    for family in decay_families(runs):
        for decay in sorted({run.decay for run in family}, reverse=True):
            part = [run for run in family if run.decay == decay]
            t90 = [step for run in part if (step := run.steps["test_90"]) is not None]
            rows.append(
                {
                    "operation": part[0].operation,
                    "lr": plain(part[0].rate),
                    "decay": plain(decay),
                    "runs": len(part),
                    "generalise": f"{len(t90)} of {len(part)}",
                    "t90, median": median(map(float, t90)),
                    "t90": f"{min(t90):,} to {max(t90):,}" if t90 else "never",
                    "in decay times": median(step * part[0].rate * decay for step in t90) if decay else None,
                    "steps": min(run.last_step for run in part),
                }
            )
        fitted.append(f"{family[0].operation}, lr {plain(family[0].rate)}: {_fits_in_words(family)}")
    table = lay("grokking_decay", rows)
    return [replace(table, notes=(*table.notes, *fitted))] if rows else []


class Fits(NamedTuple):
    """Fits of the step of generalisation t against the decay w.

    b of t = a w^-b, the root mean square of the difference of ln t by the form of the fit, and the number of runs with
    decay that never generalised and are in no fit.
    """

    exponent: float
    errors: dict[str, float]
    censored: int


def fits(runs: Sequence[ResidueRun]) -> Fits:
    """Fit the three forms of arXiv 2602.18523 to the runs of one kind that generalise under decay.

    Raises:
        UserError: There are fewer than four decays.
    """
    decayed = [run for run in runs if run.decay]
    points = [(run.decay, step) for run in decayed if (step := run.steps["test_90"]) is not None]
    decays, steps = (np.array([pair[k] for pair in points], dtype=float) for k in (0, 1))
    exponent = -scaling(decays.tolist(), steps.tolist(), decays.tolist()).whole.exponent
    logs, ones = np.log(steps), np.ones_like(steps)
    forms = {
        "a w^-b": (np.stack([np.log(decays), ones], 1), logs),
        "a exp(-b w)": (np.stack([decays, ones], 1), logs),
        "a / w + c": (np.stack([1 / decays, ones], 1) / steps[:, None], ones),  # relative errors
    }
    errors = {}
    for name, (left, right) in forms.items():
        fitted = left @ np.linalg.lstsq(left, right, rcond=None)[0]
        # A relative error is that of the logarithm, to first order.
        errors[name] = float(np.sqrt(np.mean((fitted - right) ** 2)))
    return Fits(exponent, errors, len(decayed) - len(points))


def _fits_in_words(runs: Sequence[ResidueRun]) -> str:
    """What the fits give, or why there are none."""
    try:
        fit = fits(runs)
    except UserError as error:
        return f"no fit: {error}."
    errors = ", ".join(f"{name} {error:.1%}" for name, error in fit.errors.items())
    said: str = words("tables")["grokking_decay"]["fit"].format(-fit.exponent, errors)
    return said + (f" {fit.censored} runs never generalised and are in no fit." if fit.censored else "")


def multitask_claims(runs: Sequence[Run]) -> list[Table]:
    """Judge every statement of arXiv 2602.18523 that runs with several tasks allow; nothing for others."""
    family = same_tasks(runs)
    claims = [one for judge in _CLAIMS if family and (one := judge(family)) is not None]
    said = words("claims")["several tasks"]
    columns = ("the study says", "here", "null", "reading")
    table = claims_table("grokking_multitask_claims", said["title"], claims, said["notes"], columns)
    return [table] if claims else []


def _order(runs: Sequence[Run]) -> Claim | None:
    wanted = [task for task in ("mul", "x2_y2", "add") if task in tasks_of(runs[0])]
    orders = [[task for task in order if task in wanted] for run in runs if (order := order_of(run)) is not None]
    if len(wanted) < 2 or not orders:
        return None
    same, chance = sum(order == wanted for order in orders), 1 / math.factorial(len(wanted))
    reading = "all" if same == len(orders) else "chance" if same <= chance * len(orders) else "some"
    return claim("order", reading, wanted=", ".join(wanted), same=same, count=len(orders), chance=chance)


def _onset(runs: Sequence[Run]) -> Claim | None:
    """Whether the defect across tasks crosses its threshold before all tasks generalise, beside memorisation."""
    leads: list[bool] = []
    placebo: list[bool] = []
    for run in runs:
        cross = [name for pair, name in commutators_of(run).items() if pair[0] != pair[1]]
        t90 = ResidueRun.of(run).steps["test_90"]
        if not cross or t90 is None:
            continue
        begun = onset.tenfold(run.series(f"commutator/{cross[0]}/defect"))
        memorised = [milestones_of(run, task)["train_99"] for task in tasks_of(run)]
        leads.append(begun is not None and begun < t90)
        placebo.append(None not in memorised and max(step or 0 for step in memorised) < t90)
    if not leads:
        return None
    reading = "late" if not all(leads) else "early" if all(placebo) else "mixed"
    return claim("onset across tasks", reading, leads=sum(leads), count=len(leads), placebo=sum(placebo))


def _no_decay(runs: Sequence[Run]) -> Claim | None:
    free, decayed = ([run for run in runs if bool(facts(run)["weight decay"]) is kind] for kind in (False, True))
    if not free or not decayed:
        return None
    until = min(int(run.metrics.index[-1]) for run in free)
    t90 = [ResidueRun.of(run).steps["test_90"] for run in decayed]
    late = sum(step is not None and step <= until for step in t90)
    groks = sum(ResidueRun.of(run).groks for run in free)
    reading = "groks" if groks else "reproduces" if late else "undecided"
    return claim("no decay", reading, groks=groks, free=len(free), until=until, late=late, decayed=len(decayed))


def _decay(runs: Sequence[Run]) -> Claim | None:
    for family in decay_families(runs):
        try:
            fit = fits(family)
        except UserError:
            continue
        best = min(fit.errors, key=lambda name: fit.errors[name])
        reading = "null" if abs(fit.exponent - 1) < 0.2 else "other"
        return claim("law of decay", reading, exponent=-fit.exponent, best=best, error=fit.errors[best])
    return None


_CLAIMS: tuple[Callable[[Sequence[Run]], Claim | None], ...] = (_order, _onset, _no_decay, _decay)
