"""Tables of one run of the second task: its commutator step by step, and where that points by phase."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from mini_gpt_pl.arithmetic.study.groups import commutator_note
from mini_gpt_pl.arithmetic.study.runs import TEST, TRAIN, Phase, ResidueRun, median
from mini_gpt_pl.report.sheet import Cell, Row, Table, number, tabulate, word

GRADIENTS_NOTE = (
    "‖g‖ is that of batch A. cos(g_A, g_B): 1 where both batches have one gradient, 0 where all of it is sampling "
    "noise."
)
_DEFECT = {
    "D": ("defect", "{:.3g}"),
    "‖g‖": ("norm_a", "{:.3g}"),
    "‖g_B‖": ("norm_b", "{:.3g}"),
    "cos(g_A, g_B)": ("gradient_cosine", "{:+.2f}"),
    "‖bracket‖": ("bracket", "{:.2g}"),
    "c": ("c", "{:.3g}"),
    "c‖θ‖²": ("c_theta2", "{:.2g}"),
    "relative": ("relative", "{:.2f}"),
    "resolved": ("resolved", "{:.0%}"),
    "float32 signal": ("float32_signal", "{:.2g}"),
}


def defect(run: ResidueRun) -> Table:
    """The commutator defect beside the gradient's length, and the forms of it without 1/‖g‖, step by step."""
    rows: list[Row] = []
    steps = run.commutator("norm_a").index
    for step in (int(s) for s in steps):
        accuracies = {"train": TRAIN, "test": TEST}
        cells: dict[str, Cell] = {"step": number(step, "{:,.0f}"), "phase": word(phase_at(run, step))}
        cells |= {column: number(value_at(run.series(name), step), "{:.1%}") for column, name in accuracies.items()}
        cells["‖θ‖"] = number(_exactly(run.commutator("weights"), step), "{:.1f}")
        for column, (name, form) in _DEFECT.items():
            cells[column] = number(_exactly(run.commutator(name), step), form)
        rows.append(cells)
    notes = (
        "D = ‖H_B g_A - H_A g_B‖ / (‖g_A‖ ‖g_B‖), in float64, median over the samples of a step; c = ‖bracket‖ / "
        "√(‖g_A‖ ‖g_B‖); relative: over ‖H_B g_A‖ + ‖H_A g_B‖. D holds 1/‖g‖, the others do not. " + GRADIENTS_NOTE,
        "Resolved: share of the samples whose bracket is more than rounding; the others have no D, rather than one of "
        "0. Float32 signal below 1: a difference of float32 weights would have shown rounding instead.",
        commutator_note([run]),
    )
    return tabulate("grokking_defect", "Commutator defect against the gradient's length", rows, notes)


def value_at(series: pd.Series[float], step: int) -> float:
    """Value of the last record up to a step."""
    until = series.loc[:step]
    return float(until.iloc[-1]) if len(until) else math.nan


def phase_at(run: ResidueRun, step: int) -> str:
    """Phase of a run that a step lies in."""
    own = run.phases[1:]
    return next((window.name for window in own if step <= window.last), own[-1].name if own else "-")


def _exactly(series: pd.Series[float], step: int) -> float:
    return float(series.get(step, math.nan))


BASES = {
    "path": "the path so far",
    "singular": "singular directions of the weights",
    "rank_one": "random u v'",
    "theta0": "θ₀ of each matrix",
    "other": "another run's path",
}


def projections(run: ResidueRun) -> Table:
    """How much of the bracket lies in each subspace, by phase, beside random directions of the same blocks."""
    rows: list[Row] = []
    for window in run.phases[1:] or [run.cut]:
        for basis, words in BASES.items():
            shares = inside(run.commutator(f"on_{basis}"), window)
            if not len(shares):
                continue
            rows.append({"window": word(window.words), "basis": word(words), **projected(run, basis, window)})
        rows += _alignment_row(run, window)
    notes = (
        "Length of the bracket inside the subspace over its whole, medians over the records of a phase. Same blocks: "
        "expectation for random directions inside the same matrices, as many in each; above: share of such random "
        "subspaces that hold less, 0.5 by chance. Isotropic: random directions in all weights, √(K/P).",
        "Last increment: root mean square of the cosine of the bracket with it; its null has the same coordinates with "
        "coins for signs. Signed mean: of the same cosines over the samples, 0 by chance.",
    )
    return tabulate("grokking_projections", "Where the commutator points", rows, notes)


def projected(run: ResidueRun, basis: str, window: Phase) -> dict[str, Cell]:
    """Medians over a window of what one basis holds, and of its nulls."""
    value, null, isotropic, ratio, below = (
        median(inside(run.commutator(f"on_{basis}{suffix}"), window).tolist())
        for suffix in ("", "_null", "_isotropic", "_ratio", "_below")
    )
    return {
        "inside": number(value, "{:.4f}"),
        "isotropic": number(isotropic, "{:.4f}"),
        "over isotropic": number(value / isotropic, "{:.2f}"),
        "same blocks": number(null, "{:.4f}"),
        "over same blocks": number(ratio, "{:.2f}"),
        "above": number(below, "{:.2f}"),
    }


def _alignment_row(run: ResidueRun, window: Phase) -> Sequence[Row]:
    value, null, signed = (
        median(inside(run.commutator(name), window).tolist())
        for name in ("alignment_rms", "alignment_flip", "alignment")
    )
    if math.isnan(value):
        return []
    cells = {"inside": number(value, "{:.4f}"), "same blocks": number(null, "{:.4f}")}
    cells["over same blocks"] = number(value / null, "{:.2f}")
    cells["signed mean"] = number(signed, "{:+.4f}")
    return [{"window": word(window.words), "basis": word("the last increment"), **cells}]


def inside(series: pd.Series[float], window: Phase) -> pd.Series[float]:
    """The records of a window, its first step left out, which belongs to the window before; not that of the start."""
    return series[(series.index > window.first) & (series.index <= window.last)]
