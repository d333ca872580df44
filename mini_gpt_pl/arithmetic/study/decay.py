"""Generalisation against weight decay: steps, times in units of the decay, and fits that need several decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mini_gpt_pl.arithmetic.statistics.scaling import scaling
from mini_gpt_pl.arithmetic.study.runs import ResidueRun, median, residue_runs
from mini_gpt_pl.errors import UserError
from mini_gpt_pl.report.settings import plain
from mini_gpt_pl.report.sheet import Row, Table, number, tabulate, word
from mini_gpt_pl.runs.folder import Run


def decay_table(runs: Sequence[Run]) -> list[Table]:
    """When runs of one kind generalise, by weight decay; nothing without two positive decays."""
    rows: list[Row] = []
    said: list[str] = []
    for family in decay_families(runs):
        for decay in sorted({run.decay for run in family}, reverse=True):
            rows.append(_row([run for run in family if run.decay == decay]))
        said.append(f"{family[0].operation}, lr {plain(family[0].rate)}: {fits_in_words(family)}")
    notes = [
        "In decay times: t90 × lr × decay, the power of e by which decay alone has shrunk the weights till then. If "
        "that is what generalisation waits for, this column is constant and t90 goes as 1 / decay, the null of a fit.",
        *said,
    ]
    title = "Generalisation against weight decay"
    return [tabulate("grokking_decay", title, rows, notes)] if rows else []


def decay_families(runs: Sequence[Run]) -> list[list[ResidueRun]]:
    """Runs that differ in their decay and seed only, where there are two positive decays."""
    families: dict[tuple[object, ...], list[ResidueRun]] = {}
    for run in residue_runs(runs):
        data = {k: v for k, v in (run.settings.get("data") or {}).items() if k not in ("seed", "split_seed")}
        families.setdefault((run.operation, run.rate, repr(data)), []).append(run)
    return [family for family in families.values() if len({run.decay for run in family if run.decay}) > 1]


def _row(part: Sequence[ResidueRun]) -> Row:
    reached = [step for run in part if (step := run.steps["test_90"]) is not None]
    first = part[0]
    spread = f"{min(reached):,} to {max(reached):,}" if reached else "never"
    waited = median([step * first.rate * first.decay for step in reached]) if first.decay else math.nan
    return {
        "operation": word(first.operation),
        "lr": word(plain(first.rate)),
        "decay": word(plain(first.decay)),
        "runs": number(len(part), "{:.0f}"),
        "generalise": word(f"{len(reached)} of {len(part)}"),
        "t90, median": number(median([float(step) for step in reached]), "{:,.0f}"),
        "t90": word(spread),
        "in decay times": number(waited, "{:.2f}"),
        "steps": number(min(run.last_step for run in part), "{:,.0f}"),
    }


@dataclass(frozen=True)
class Fits:
    """Fits of the step of generalisation t against the decay w.

    Args:
        exponent: b of t = a w^-b.
        errors: Root mean square of the difference of ln t, by the form of the fit.
        censored: Runs with decay that never generalised and are in no fit.
    """

    exponent: float
    errors: dict[str, float]
    censored: int


def fits(runs: Sequence[ResidueRun]) -> Fits:
    """Fit the three forms of arXiv 2602.18523 to the runs that generalise.

    Args:
        runs: Of one kind; those without decay are left out.

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


def fits_in_words(runs: Sequence[ResidueRun]) -> str:
    """What the fits give, or why there are none."""
    try:
        fit = fits(runs)
    except UserError as error:
        return f"no fit: {error}."
    errors = ", ".join(f"{name} {error:.1%}" for name, error in fit.errors.items())
    left = f" {fit.censored} runs never generalised and are in no fit." if fit.censored else ""
    return f"t90 goes as decay^{-fit.exponent:+.2f} (null -1); errors of the fits: {errors}.{left}"
