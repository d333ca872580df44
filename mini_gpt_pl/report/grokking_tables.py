"""Tables of one run of the second task: milestones, PC1 by phase beside every null, persistence, and commutators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from mini_gpt_pl.geometry import resampled
from mini_gpt_pl.report.grokking_groups import commutator_note
from mini_gpt_pl.report.grokking_runs import (
    DECAYING,
    NULLS,
    NULLS_NOTE,
    TEST,
    TRAIN,
    GrokkingRun,
    Numbers,
    Window,
    grokking_runs,
    median,
)
from mini_gpt_pl.report.sheet import Cell, Row, Table, gap, number, tabulate, word
from mini_gpt_pl.runs import Run

MILESTONES = {
    "train_99": "99 % of the training set",
    "t10": "10 % of the test set",
    "t50": "50 % of the test set",
    "t90": "90 % of the test set (the paper's grok step)",
    "t95": "95 %",
    "t98": "98 %",
    "stop": "98 % in the third evaluation in a row (the original's stop)",
}
WINDOWS_NOTE = (
    "A share says first of all where a path was cut: snapshots counts those of the window. Windows of fewer than four "
    "are left out, and those of a few say little."
)
_SHARE, _COSINE, _COUNT, _STEP = "{:.1%}", "{:+.3f}", "{:.0f}", "{:,.0f}"
_DRAWS = 100


def grokking_tables(run: Run) -> list[Table]:
    """Make every table of one run that its data allow; none if it is of another task or was not evaluated."""
    found = grokking_runs([run])
    if not found:
        return []
    one = found[0]
    tables = [milestones(one), pc1(one), quantiles(one), components(one), initial_weights(one)]
    tables += [persistence(one), defect(one), projections(one)]
    return [table for table in tables if not table.frame.empty]


def milestones(run: GrokkingRun) -> Table:
    """Steps at which the run got somewhere, with accuracies and ‖θ‖ there, and what it ended at."""
    rows = [_at(MILESTONES[name], step, run) for name, step in run.steps.items()]
    rows.append(_at("end", int(run.series(TEST).index[-1]), run))
    note = None if run.groks else "It has not generalised: nothing says that it never would."
    return tabulate("grokking_milestones", "Memorisation and generalisation", rows, [note])


def _at(words: str, step: int | None, run: GrokkingRun) -> Row:
    if step is None:
        return {"milestone": word(words), "step": word("never")}
    shown = {"training accuracy": TRAIN, "test accuracy": TEST}
    cells = {column: number(_value(run.series(name), step), _SHARE) for column, name in shown.items()}
    weights = number(_value(run.series("eval/weight_norm"), step), "{:.1f}")
    return {"milestone": word(words), "step": number(step, _STEP), **cells, "‖θ‖": weights}


def _value(series: pd.Series[float], step: int) -> float:
    """Value of the last record up to a step."""
    until = series.loc[:step]
    return float(until.iloc[-1]) if len(until) else math.nan


# ------------------------------------------------------------------------------------------------------- paths


def against(found: Numbers, name: str, form: str) -> dict[str, Cell]:
    """Cells of a statistic: measured, each null, and its excess over each of the two that decay."""
    values = found[name]
    cells = {"measured": number(values["measured"], form)}
    cells |= {column: number(values[null], form) for null, column in NULLS.items()}
    excess = {f"excess, {NULLS[null].split()[-1]}": gap(values["measured"] - values[null], form) for null in DECAYING}
    return cells | excess


def pc1(run: GrokkingRun) -> Table:
    """Centred PC1 of every matrix to the stop and in each phase, beside every null."""
    rows: list[Row] = []
    for window in run.phases:
        for label, found in run.path(window).items():
            snapshots = number(float(len(run.window(window))), _COUNT)
            rows.append(
                {"window": word(window.words), "weights": word(short(label)), "snapshots": snapshots}
                | against(found, "pc1_centred", _SHARE)
            )
    return tabulate("grokking_pc1", "Centred PC1, to the stop and by phase", rows, [NULLS_NOTE, WINDOWS_NOTE])


def short(label: str) -> str:
    """Name of a matrix as the studies have it, such as `L0 Q`; other weights keep theirs."""
    parts = label.split(".")
    if len(parts) == 4 and parts[0] == "blocks" and parts[3].startswith("w_"):
        return f"L{parts[1]} {parts[3][2:].upper()}"
    return label


def quantiles(run: GrokkingRun) -> Table:
    """Where the centred PC1 to the stop lies among draws of each null in as many dimensions as the weights have."""
    rows: list[Row] = []
    for label in run.path(run.cut):
        trajectory = run.window(run.cut)
        group = None if label == run.run.trunk else label
        dim = trajectory.dim_of(group)
        found = resampled.place(trajectory.gram(group), trajectory.survival, dim, _DRAWS)["pc1_centred"]
        cells = {"weights": word(short(label)), "measured": number(found.value, _SHARE)}
        for null, column in NULLS.items():
            band = found.bands[null]
            cells[column] = word(f"{band.low:.1%} to {band.high:.1%}") if band.low == band.low else word("-")
            cells[f"above, {column}"] = number(band.below, "{:.2f}")
        rows.append(cells)
    note = (
        f"95 % of {_DRAWS} draws in as many dimensions as there are weights, and the share of the draws that the "
        "measured value is above. No z: a null's spread shrinks with the number of weights."
    )
    return tabulate("grokking_quantiles", "Centred PC1 to the stop among its nulls", rows, [note, NULLS_NOTE])


# Statistic -> column and form.
_COMPONENTS = {
    "pc1": ("raw PC1", _SHARE),
    "k95_centred": ("k95", _COUNT),
    "k99_centred": ("k99", _COUNT),
    "pc1_centred_off": ("PC1 without θ₀", _SHARE),
}
_INITIAL = {
    "cos_theta0_centred": ("cos(v₁, θ₀)", _COSINE),
    "cos_theta0": ("cos(v_b, θ₀)", _COSINE),
    "energy_theta0": ("drift energy on θ₀", _SHARE),
}


def components(run: GrokkingRun) -> Table:
    """Uncentred PC1, numbers of components, and PC1 with the axis θ₀ projected out, to the stop and by phase."""
    note = (
        "k95, k99: components that hold 95 and 99 % of the centred spread. Without θ₀: that axis projected out first."
    )
    rows = _beside_decay(run, _COMPONENTS)
    return tabulate("grokking_components", "Numbers of components, and PC1 in other ways", rows, [note, NULLS_NOTE])


def initial_weights(run: GrokkingRun) -> Table:
    """How much of the path is the weights that it starts from, to the stop and by phase."""
    note = (
        "θ₀: the weights that the window starts from. v₁: first centred direction; v_b: first direction of the drift. "
        "Signs are such that the last coordinate is positive, so that decay has negative cosines."
    )
    rows = _beside_decay(run, _INITIAL)
    return tabulate("grokking_theta0", "How much of the path is the initial weights", rows, [note, NULLS_NOTE])


def _beside_decay(run: GrokkingRun, shown: Mapping[str, tuple[str, str]]) -> list[Row]:
    """Numbers of every window and group beside the two nulls that decay."""
    rows: list[Row] = []
    for window in run.phases:
        for label, found in run.path(window).items():
            cells: dict[str, Cell] = {"window": word(window.words), "weights": word(short(label))}
            for name, (column, form) in shown.items():
                cells[column] = number(found[name]["measured"], form)
                for null in DECAYING:
                    cells[f"{column}: {NULLS[null]}"] = number(found[name][null], form)
            rows.append(cells)
    return rows


def persistence(run: GrokkingRun) -> Table:
    """Correlation of increments and of innovations at lag 1, with the tangential part beside it."""
    rows: list[Row] = []
    for window in run.phases:
        for label, found in run.path(window).items():
            whole, across = (run.correlation(window, label, tangential=side) for side in (False, True))
            increments = found["autocorrelation"]
            rows.append(
                {
                    "window": word(window.words),
                    "weights": word(short(label)),
                    "increments": number(increments["measured"], _COSINE),
                    "increments: decay, ‖d‖": number(increments["decaying_walk"], _COSINE),
                    "increments: decay, ‖e‖": number(increments["innovation_walk"], _COSINE),
                    "innovations": number(whole.value, _COSINE, whole.error, "error"),
                    "tangential": number(across.value, _COSINE, across.error, "error"),
                    "chance": number(whole.chance, "{:.3f}"),
                    "tangential, permuted": number(found["autocorrelation_tangential"]["permuted"], _COSINE),
                }
            )
    notes = (
        "Correlation of successive steps at lag 1. Innovations: what is left of an increment when decay is taken out; "
        "zero for every walk, decaying or not. Weights that rest where training balances decay have 1 there, so the "
        "tangential one, without the part along the weights, is the evidence of a motion.",
        "±: standard error over the pairs. Chance: standard deviation of isotropic innovations, a lower bound.",
    )
    return tabulate("grokking_persistence", "Do successive steps agree?", rows, notes)


# ------------------------------------------------------------------------------------------------- commutators

_DEFECT = {
    "D": ("defect", "{:.3g}"),
    "‖g‖": ("norm_a", "{:.3g}"),
    "c": ("c", "{:.3g}"),
    "c‖θ‖²": ("c_theta2", "{:.2g}"),
    "relative": ("relative", "{:.2f}"),
    "resolved": ("resolved", "{:.0%}"),
    "float32 signal": ("float32_signal", "{:.2g}"),
}


def defect(run: GrokkingRun) -> Table:
    """The commutator defect beside the gradient's length, and the forms of it without 1/‖g‖, step by step."""
    rows: list[Row] = []
    steps = run.commutator("norm_a").index
    for step in (int(s) for s in steps):
        accuracies = {"train": TRAIN, "test": TEST}
        cells: dict[str, Cell] = {"step": number(step, _STEP), "phase": word(phase_at(run, step))}
        cells |= {column: number(_value(run.series(name), step), _SHARE) for column, name in accuracies.items()}
        cells["‖θ‖"] = number(_exactly(run.commutator("weights"), step), "{:.1f}")
        for column, (name, form) in _DEFECT.items():
            cells[column] = number(_exactly(run.commutator(name), step), form)
        rows.append(cells)
    notes = (
        "D = ‖H_B g_A - H_A g_B‖ / (‖g_A‖ ‖g_B‖), in float64, median over the samples of a step; c = ‖bracket‖ / "
        "√(‖g_A‖ ‖g_B‖); relative: over ‖H_B g_A‖ + ‖H_A g_B‖. D holds 1/‖g‖, the others do not.",
        "Resolved: share of the samples whose bracket is more than rounding; the others have no D, rather than one of "
        "0. Float32 signal below 1: a difference of float32 weights would have shown rounding instead.",
        commutator_note([run]),
    )
    return tabulate("grokking_defect", "Commutator defect against the gradient's length", rows, notes)


def phase_at(run: GrokkingRun, step: int) -> str:
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


def projections(run: GrokkingRun) -> Table:
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
        "coins for signs.",
    )
    return tabulate("grokking_projections", "Where the commutator points", rows, notes)


def projected(run: GrokkingRun, basis: str, window: Window) -> dict[str, Cell]:
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


def _alignment_row(run: GrokkingRun, window: Window) -> Sequence[Row]:
    value, null = (
        median(inside(run.commutator(name), window).tolist()) for name in ("alignment_rms", "alignment_flip")
    )
    if math.isnan(value):
        return []
    cells = {"inside": number(value, "{:.4f}"), "same blocks": number(null, "{:.4f}")}
    cells["over same blocks"] = number(value / null, "{:.2f}")
    return [{"window": word(window.words), "basis": word("the last increment"), **cells}]


def inside(series: pd.Series[float], window: Window) -> pd.Series[float]:
    """The records of a window, its first step left out, which belongs to the window before; not that of the start."""
    return series[(series.index > window.first) & (series.index <= window.last)]
