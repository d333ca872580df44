"""What the study of several tasks (arXiv 2602.18523) says, beside what runs say: all cells are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mini_gpt_pl.arithmetic.statistics import onset
from mini_gpt_pl.arithmetic.study.decay import decay_families, fits
from mini_gpt_pl.arithmetic.study.multitask import commutators_of, milestones_of, order_of, same_tasks, t90_of, tasks_of
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.claims import Claim, claims_table
from mini_gpt_pl.report.settings import facts
from mini_gpt_pl.report.sheet import Table
from mini_gpt_pl.runs.folder import Run

_PUBLISHED_ORDER = ("mul", "x2_y2", "add")
_NOT_HERE = (
    "Not repeated here: ρ of 1.000, which any few directions give; the deletion of gradients, pruning and truncation. "
    "`mini_gpt_pl reconstruction RUN` prints how many directions rebuild a run (published: 4 to 8 "
    "of the whole run's, which know its end) beside bases that do not know the end."
)


def multitask_claims(runs: Sequence[Run]) -> list[Table]:
    """Judge every statement that runs with several tasks allow; nothing for others."""
    family = same_tasks(runs)
    claims = [claim for judge in _CLAIMS if family and (claim := judge(family)) is not None]
    title = "What the study of several tasks says, and what these runs say"
    columns = ("the study says", "here", "null", "reading")
    return [claims_table("grokking_multitask_claims", title, claims, [_NOT_HERE], columns)] if claims else []


def _is_free(run: Run) -> bool:
    return not facts(run)["weight decay"]


def _order(runs: Sequence[Run]) -> Claim | None:
    wanted = [task for task in _PUBLISHED_ORDER if task in tasks_of(runs[0])]
    orders = [[task for task in order if task in wanted] for run in runs if (order := order_of(run)) is not None]
    if len(wanted) < 2 or not orders:
        return None
    same = sum(order == wanted for order in orders)
    chance = 1 / math.factorial(len(wanted))
    verdict = "reproduces" if same == len(orders) else "does not reproduce" if same <= chance * len(orders) else "mixed"
    return Claim(
        "mul generalises first, then x2_y2, then add",
        f"{', '.join(wanted)} in {same} of {len(orders)} runs in which all tasks generalise, one after the other",
        f"any order: {chance:.0%} of the runs",
        f"**{verdict}**: seeds of one setting share its order and are one unit.",
    )


def _no_decay(runs: Sequence[Run]) -> Claim | None:
    free, decayed = ([run for run in runs if _is_free(run) is kind] for kind in (True, False))
    if not free or not decayed:
        return None
    until = min(int(run.metrics.index[-1]) for run in free)
    late = sum((step := t90_of(run)) is not None and step <= until for run in decayed)
    groks = sum(t90_of(run) is not None for run in free)
    verdict = "does not reproduce" if groks else "reproduces" if late else "undecided"
    return Claim(
        "Without weight decay no run generalises",
        f"{groks} of {len(free)} runs without it, in {until:,} steps or more",
        f"{late} of {len(decayed)} runs with it in the same steps",
        f"**{verdict}**: nothing says that a run never would.",
    )


def _onset(runs: Sequence[Run]) -> Claim | None:
    """Whether the defect across tasks crosses its threshold before all tasks generalise, beside memorisation."""
    leads: list[bool] = []
    placebo: list[bool] = []
    for run in runs:
        cross = [name for pair, name in commutators_of(run).items() if pair[0] != pair[1]]
        t90 = t90_of(run)
        if not cross or t90 is None:
            continue
        series = run.series(f"commutator/{cross[0]}/defect")
        begun = onset.tenfold([int(step) for step in series.index], series.tolist())
        memorised = [milestones_of(run, task)["train_99"] for task in tasks_of(run)]
        leads.append(begun is not None and begun < t90)
        placebo.append(None not in memorised and max(step or 0 for step in memorised) < t90)
    if not leads:
        return None
    every = all(leads)
    null = f"99 % of the training set comes first in {sum(placebo)} of {len(placebo)}"
    reading = "**no warning**: so does anything early" if every and all(placebo) else "**mixed**"
    return Claim(
        "The onset of the defect comes before generalisation in 42 of 42 conditions",
        f"across tasks in {sum(leads)} of {len(leads)} runs that generalise",
        null,
        f"{reading if every else '**does not reproduce**'}.",
    )


def _decay(runs: Sequence[Run]) -> Claim | None:
    for family in decay_families(runs):
        try:
            fit = fits(family)
        except UserError:
            continue
        best = min(fit.errors, key=lambda name: fit.errors[name])
        verdict = "the null" if abs(fit.exponent - 1) < 0.2 else "not the null"
        return Claim(
            "Generalisation comes later with less decay, as a power of it, an exponential, or a / w + c",
            f"t90 goes as decay^{-fit.exponent:+.2f}; {best} fits best, to {fit.errors[best]:.0%}",
            "decay^-1: a step count in units of 1 / (lr × decay)",
            f"**{verdict}**.",
        )
    return None


_CLAIMS: tuple[Callable[[Sequence[Run]], Claim | None], ...] = (_order, _onset, _no_decay, _decay)
