"""Tables of one run of the second task: milestones, PC1 by phase beside every null, and persistence."""

from __future__ import annotations

import math

from mini_gpt_pl.arithmetic.study.commutators import defect, projections, value_at
from mini_gpt_pl.arithmetic.study.runs import (
    DECAYING,
    NULLS,
    NULLS_NOTE,
    TEST,
    TRAIN,
    Numbers,
    ResidueRun,
    residue_runs,
)
from mini_gpt_pl.geometry.path import innovations, nulls, pca, resampled
from mini_gpt_pl.geometry.path.trajectory import Trajectory
from mini_gpt_pl.report.sheet import Cell, Row, Table, gap, number, tabulate, word
from mini_gpt_pl.runs.folder import Run

MILESTONES = {
    "train_99": "99 % of the training set",
    "test_10": "10 % of the test set",
    "test_50": "50 % of the test set",
    "test_90": "90 % of the test set (the paper's grok step)",
    "test_95": "95 %",
    "test_98": "98 %",
    "test_98_thrice": "98 % in the third evaluation in a row (the original's stop)",
}
WINDOWS_NOTE = (
    "A share says first of all where a path was cut: snapshots counts those of the window. Windows of fewer than four "
    "are left out, and those of a few say little."
)
_SHARE, _COSINE, _COUNT, _STEP = "{:.1%}", "{:+.3f}", "{:.0f}", "{:,.0f}"
_DRAWS = 100


def run_tables(run: Run) -> list[Table]:
    """Make every table of one run that its data allow; none if it is of another task or was not evaluated."""
    runs = residue_runs([run])
    if not runs:
        return []
    one = runs[0]
    tables = [milestones(one), pc1(one), quantiles(one), components(one), initial_weights(one)]
    tables += [persistence(one), defect(one), projections(one)]
    return [table for table in tables if not table.frame.empty]


def milestones(run: ResidueRun) -> Table:
    """Steps at which the run got somewhere, with accuracies and ‖θ‖ there, and what it ended at."""
    rows = [_at(MILESTONES[name], step, run) for name, step in run.steps.items()]
    rows.append(_at("end", int(run.series(TEST).index[-1]), run))
    note = None if run.groks else "It has not generalised: nothing says that it never would."
    return tabulate("grokking_milestones", "Memorisation and generalisation", rows, [note])


def _at(words: str, step: int | None, run: ResidueRun) -> Row:
    if step is None:
        return {"milestone": word(words), "step": word("never")}
    shown = {"training accuracy": TRAIN, "test accuracy": TEST}
    cells = {column: number(value_at(run.series(name), step), _SHARE) for column, name in shown.items()}
    weights = number(value_at(run.series("eval/weight_norm"), step), "{:.1f}")
    return {"milestone": word(words), "step": number(step, _STEP), **cells, "‖θ‖": weights}


# ------------------------------------------------------------------------------------------------------- paths


def against(statistics: Numbers, name: str, form: str) -> dict[str, Cell]:
    """Cells of a statistic: measured, each null, and its excess over each of the two that decay."""
    values = statistics[name]
    cells = {"measured": number(values["measured"], form)}
    cells |= {column: number(values[null], form) for null, column in NULLS.items()}
    excess = {f"excess, {NULLS[null].split()[-1]}": gap(values["measured"] - values[null], form) for null in DECAYING}
    return cells | excess


def pc1(run: ResidueRun) -> Table:
    """Centred PC1 of every matrix to the stop and in each phase, beside every null."""
    rows: list[Row] = []
    for window in run.phases:
        for label, statistics in run.numbers(window).items():
            snapshots = number(float(len(run.within(window))), _COUNT)
            rows.append(
                {"window": word(window.words), "weights": word(short(label)), "snapshots": snapshots}
                | against(statistics, "pc1_centred", _SHARE)
            )
    return tabulate("grokking_pc1", "Centred PC1, to the stop and by phase", rows, [NULLS_NOTE, WINDOWS_NOTE])


def short(label: str) -> str:
    """Name of a matrix as the studies have it, such as `L0 Q`; other weights keep theirs."""
    parts = label.split(".")
    if len(parts) == 4 and parts[0] == "blocks" and parts[3].startswith("w_"):
        return f"L{parts[1]} {parts[3][2:].upper()}"
    return label


def quantiles(run: ResidueRun) -> Table:
    """Where the numbers of the path to the stop lie among draws of each null in as many dimensions as the weights."""
    rows: list[Row] = []
    for label in run.numbers(run.cut):
        trajectory = run.within(run.cut)
        group = None if label == run.trunk else label
        dim = trajectory.dim_of(group)
        placed = resampled.place(trajectory.gram(group), trajectory.survival, dim, _DRAWS)
        for name, (words, form) in {"pc1_centred": ("centred PC1", _SHARE), **_COMPONENTS}.items():
            head = {"weights": word(short(label)), "number": word(words)}
            rows.append(head | _among(placed[name], form))
    note = (
        f"95 % of {_DRAWS} draws in as many dimensions as there are weights, and the share of the draws that the "
        "measured value is above. No z: a null's spread shrinks with the number of weights."
    )
    return tabulate("grokking_quantiles", "The path to the stop among its nulls", rows, [note, NULLS_NOTE])


def _among(placed: resampled.Placed, form: str) -> dict[str, Cell]:
    cells = {"measured": number(placed.value, form)}
    for null, column in NULLS.items():
        band = placed.bands[null]
        ends = f"{form.format(band.low)} to {form.format(band.high)}"
        span = Cell(ends, None, {"low": band.low, "high": band.high})
        cells[column] = number(None) if math.isnan(band.low) else span
        cells[f"above, {column}"] = number(band.below, "{:.2f}")
    return cells


# Statistic -> column and form.
_COMPONENTS = {
    "pc1": ("raw PC1", _SHARE),
    "k90_centred": ("k90", _COUNT),
    "k95_centred": ("k95", _COUNT),
    "k99_centred": ("k99", _COUNT),
    "pc1_centred_off": ("PC1 without θ₀", _SHARE),
}
_INITIAL = {
    "cos_theta0_centred": ("cos(v₁, θ₀)", _COSINE),
    "cos_theta0_unit": ("cos(v_b, θ₀)", _COSINE),
    "cos_theta0": ("cos(raw v_b, θ₀)", _COSINE),
    "energy_theta0": ("drift energy on θ₀", _SHARE),
}


def components(run: ResidueRun) -> Table:
    """Uncentred PC1, numbers of components, and PC1 with the axis θ₀ projected out, to the stop and by phase."""
    note = (
        "k90, k95, k99: components that hold 90, 95 and 99 % of the centred spread. Without θ₀: that axis projected "
        "out first."
    )
    rows: list[Row] = []
    for window in run.phases:
        for label, statistics in run.numbers(window).items():
            for name, (words, form) in _COMPONENTS.items():
                head = {"window": word(window.words), "weights": word(short(label)), "number": word(words)}
                rows.append(head | against(statistics, name, form))
    return tabulate("grokking_components", "Numbers of components, and PC1 in other ways", rows, [note, NULLS_NOTE])


def initial_weights(run: ResidueRun) -> Table:
    """How much of the path is the weights that it starts from, to the stop and by phase."""
    note = (
        "θ₀: the weights that the window starts from, θ those that it ends at; decay alone leaves cos(θ, θ₀) = 1. v₁: "
        "first centred direction; v_b: first direction of the drift, its rows of length 1; raw v_b: rows as they are. "
        "Signs are such that the last coordinate is positive, so that decay has negative cosines."
    )
    rows = _beside_decay(run)
    return tabulate("grokking_theta0", "How much of the path is the initial weights", rows, [note, NULLS_NOTE])


def _beside_decay(run: ResidueRun) -> list[Row]:
    """How much of every window and group is theta_0, beside the two nulls that decay."""
    rows: list[Row] = []
    for window in run.phases:
        for label, statistics in run.numbers(window).items():
            cells: dict[str, Cell] = {"window": word(window.words), "weights": word(short(label))}
            cells |= _ends(run.within(window), None if label == run.trunk else label)
            for name, (column, form) in _INITIAL.items():
                cells[column] = number(statistics[name]["measured"], form)
                for null in DECAYING:
                    cells[f"{column}: {NULLS[null]}"] = number(statistics[name][null], form)
            rows.append(cells)
    return rows


def _ends(path: Trajectory, group: str | None) -> dict[str, Cell]:
    """Length and direction of the weights that a path ends at, beside what its own decay leaves of its walks."""
    gram = path.gram(group)
    walks = {
        "": gram,
        "decaying_walk": nulls.decaying_walk(gram, path.survival),
        "innovation_walk": innovations.innovation_walk(gram, path.survival),
    }
    start, *_, end = pca.weights(len(gram))
    lengths = {name: float(pca.norms(one, end[None])[0]) for name, one in walks.items()}
    cosines = {name: pca.cosine(one, start, end) for name, one in walks.items()}
    first = float(pca.norms(gram, start[None])[0])
    cells = {"‖θ‖": number(lengths[""], "{:.3g}"), "‖θ‖: decay alone": number(first * path.survival[-1], "{:.3g}")}
    cells |= {f"‖θ‖: {NULLS[null]}": number(lengths[null], "{:.3g}") for null in DECAYING}
    cells["cos(θ, θ₀)"] = number(cosines[""], _COSINE)
    return cells | {f"cos(θ, θ₀): {NULLS[null]}": number(cosines[null], _COSINE) for null in DECAYING}


def persistence(run: ResidueRun) -> Table:
    """Correlation of increments and of innovations at lag 1, with the tangential part beside it."""
    rows: list[Row] = []
    for window in run.phases:
        for label, statistics in run.numbers(window).items():
            whole, across = (run.correlation(window, label, tangential=side) for side in (False, True))
            increments = statistics["autocorrelation"]
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
                    "tangential, permuted": number(statistics["autocorrelation_tangential"]["permuted"], _COSINE),
                }
            )
    notes = (
        "Correlation of successive steps at lag 1. Innovations: what is left of an increment when decay is taken out; "
        "zero for every walk, decaying or not. Weights that rest where training balances decay have 1 there, so the "
        "tangential one, without the part along the weights, is the evidence of a motion.",
        "±: standard error over the pairs. Chance: standard deviation of isotropic innovations, a lower bound.",
    )
    return tabulate("grokking_persistence", "Do successive steps agree?", rows, notes)
